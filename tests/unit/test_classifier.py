"""Building a classifier by its configuration, and keeping it in files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from proxyrob.config import CnnModel, ResnetModel
from proxyrob.errors import DataIntegrityError
from proxyrob.models import (
    ClassifierCard,
    build_classifier,
    channel_statistics,
    load_classifier,
    read_classifier,
    save_classifier,
)
from proxyrob.storage import Stage
from proxyrob.types import as_images
from tests.toys import files_below, random_images, same_state, tiny_split

CNN, RESNET = CnnModel(widths=(4, 6)), ResnetModel(widths=(4, 6), blocks_per_stage=2)


def _card(model: CnnModel | ResnetModel = CNN, shape: tuple[int, int, int] = (2, 5, 7), num_classes: int = 3) -> ClassifierCard:
    return ClassifierCard(model=model, image_shape=shape, num_classes=num_classes, mean=(0.25, 0.5), std=(0.5, 0.125))


@pytest.mark.parametrize("model", [CNN, RESNET, CnnModel(widths=(4,)), ResnetModel(widths=(4,))])
def test_any_image_size_and_any_number_of_classes(model: CnnModel | ResnetModel) -> None:
    """Odd sizes, two channels and three classes give a logit per class."""
    classifier = build_classifier(_card(model), seed=0).eval()
    assert classifier(random_images(4, shape=(2, 5, 7))).shape == (4, 3)


def test_the_seed_alone_decides_the_weights() -> None:
    """The same seed gives the same weights whatever was drawn before; another seed others; no global state moves."""
    first = build_classifier(_card(), seed=5)
    torch.rand(10)
    before = torch.get_rng_state()
    second, other = build_classifier(_card(), seed=5), build_classifier(_card(), seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(first.state_dict(), second.state_dict())
    assert not same_state(first.state_dict(), other.state_dict())


def test_normalisation_is_the_first_layer() -> None:
    """The classifier takes pixels in [0,1] and normalises each channel by its own mean and deviation."""
    classifier = build_classifier(_card(), seed=0).eval()
    images = random_images(4, shape=(2, 5, 7))
    normalised = torch.stack([(images[:, 0] - 0.25) / 0.5, (images[:, 1] - 0.5) / 0.125], dim=1)
    assert torch.allclose(classifier(images), classifier.network(normalised), atol=1e-6)


def test_a_deeper_network_has_more_blocks() -> None:
    """``blocks_per_stage`` is used."""
    sizes = [
        sum(
            weight.numel() for weight in build_classifier(_card(ResnetModel(widths=(4, 6), blocks_per_stage=k)), 0).parameters()
        )
        for k in (1, 2)
    ]
    assert sizes[1] - sizes[0] == (2 * 4 * 4 * 9 + 4 * 4) + (2 * 6 * 6 * 9 + 4 * 6)


def test_no_positive_deviation_is_refused() -> None:
    """Dividing by zero, or by fewer deviations than channels, is refused."""
    card = _card().model_dump()
    for wrong in ({"std": (0.5, 0.0)}, {"std": (0.5,)}):
        with pytest.raises(ValueError, match="expected as many means as positive standard deviations"):
            build_classifier(ClassifierCard.model_validate({**card, **wrong}), seed=0)


def test_statistics_are_those_of_each_channel() -> None:
    """Mean and deviation over all images and pixels of a channel; a constant channel keeps a deviation above 0."""
    stored = tiny_split(50, shape=(4, 4, 2)).stored
    stored[..., 1] = 51
    images = as_images(stored)
    mean, std = channel_statistics(stored)
    assert mean == pytest.approx((np.mean(images[:, 0].numpy(), dtype=np.float64), 0.2))
    assert std == pytest.approx((np.std(images[:, 0].numpy(), ddof=1, dtype=np.float64), 1e-3))


def test_normalisation_is_that_of_the_converted_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images are counted at a time, the figures are bit for bit the same, and those of all images at once."""
    stored = tiny_split(50, shape=(4, 5, 3)).stored
    counted = channel_statistics(stored)
    monkeypatch.setattr("proxyrob.models.classifier.BLOCK_PIXELS", 7 * 20)
    assert channel_statistics(stored) == counted
    flat = as_images(stored).transpose(0, 1).flatten(1).double()
    assert np.allclose(counted, (flat.mean(dim=1), flat.std(dim=1)), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("model", [CNN, RESNET])
def test_saving_and_reading_gives_the_same_network(model: CnnModel | ResnetModel, tmp_path: Path) -> None:
    """Weights, running statistics, normalisation and card survive bit for bit, in two files that hold no Python."""
    classifier = build_classifier(_card(model), seed=0).train()
    classifier(random_images(4, shape=(2, 5, 7)))
    save_classifier(classifier, tmp_path)
    assert files_below(tmp_path) == {"model.safetensors", "model.json"}
    found = read_classifier(tmp_path / "model.safetensors", tmp_path / "model.json")
    assert found.card == classifier.card
    assert same_state(found.state_dict(), classifier.state_dict())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """A card and weights that do not fit each other are refused by their names."""
    save_classifier(build_classifier(_card(CNN), seed=0), tmp_path / "cnn")
    save_classifier(build_classifier(_card(RESNET), seed=0), tmp_path / "resnet")
    with pytest.raises(DataIntegrityError, match=r"cnn/model\.safetensors does not hold the network that .*resnet/model\.json"):
        read_classifier(tmp_path / "cnn" / "model.safetensors", tmp_path / "resnet" / "model.json")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str) -> None:
    """A truncated file is an integrity error, whichever it is."""
    save_classifier(build_classifier(_card(), seed=0), tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
    with pytest.raises(DataIntegrityError, match="does not hold the network"):
        read_classifier(tmp_path / "model.safetensors", tmp_path / "model.json")


def test_a_card_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    """A network of a later program is not guessed at."""
    save_classifier(build_classifier(_card(), seed=0), tmp_path)
    content = json.loads((tmp_path / "model.json").read_text())
    content["model"]["kind"] = "vit"
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(DataIntegrityError, match="vit"):
        read_classifier(tmp_path / "model.safetensors", tmp_path / "model.json")


def test_a_loaded_classifier_is_in_eval_mode(other_classifier: Stage) -> None:
    """Whoever loads a classifier measures it: batch normalisation uses its running statistics."""
    classifier = load_classifier(other_classifier)
    assert not any(module.training for module in classifier.modules())
