"""Loading published checkpoints: what files hold weights, under which names, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from proxyrob.config.models import WideResnetModel
from proxyrob.errors import DataIntegrityError
from proxyrob.models import (
    PUBLISHED,
    Classifier,
    ClassifierCard,
    build_classifier,
    load_published,
    published_card,
    read_classifier,
    save_classifier,
)
from tests.toys import random_images, same_state

MEAN, STD = (0.25, 0.5, 0.75), (0.5, 0.25, 0.125)
CARD = ClassifierCard(
    model=WideResnetModel(depth=10, width=1, activation="silu", variant="deepmind"),
    image_shape=(3, 32, 32),
    num_classes=10,
    mean=MEAN,
    std=STD,
)

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """A classifier with running statistics of its own."""
    built = build_classifier(CARD, seed=3).train()
    with torch.no_grad():
        built(random_images(4, shape=CARD.image_shape))
    return built.eval()


def _saved(content: Any, folder: Path, name: str = "weights.pt") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def _below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _normalisation(mean: str, std: str) -> State:
    return {mean: torch.tensor(MEAN).view(1, 3, 1, 1), std: torch.tensor(STD).view(3, 1, 1)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 7},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}, "args": {"depth": 10}},
        lambda state: _below("module.", state),
        lambda state: _below("module.model.", state),
        lambda state: _below("_orig_mod.module.", state),
        lambda state: {**state, **_normalisation("mean", "std")},
        lambda state: _below("module.", {**state, **_normalisation("mu", "sigma")}),
        lambda state: {**_normalisation("normalize.mean", "normalize.std"), **_below("model.", state)},
        lambda state: _below("module.", {**_normalisation("0.mean", "0.std"), **_below("1.", state)}),
        lambda state: {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")},
    ],
    ids=[
        "plain",
        "state_dict",
        "model_state_dict",
        "nested",
        "module",
        "module.model",
        "compiled",
        "mean-std",
        "mu-sigma",
        "normalize",
        "sequential",
        "old-torch",
    ],
)
def test_weights_are_found_however_they_are_wrapped(
    wrap: Callable[[State], dict[str, Any]], classifier: Classifier, tmp_path: Path
) -> None:
    """Containers, prefixes and a normalisation beside the network do not matter; the result is in eval mode."""
    path = _saved(wrap(classifier.network.state_dict()), tmp_path)
    found, images = load_published(CARD, path), random_images(3, shape=CARD.image_shape)
    assert found.card == CARD
    assert not any(module.training for module in found.modules())
    with torch.inference_mode():
        assert torch.equal(found(images), classifier(images))


def test_safetensors_are_read(classifier: Classifier, tmp_path: Path) -> None:
    """A file of safetensors gives the same network, and what was loaded can be kept as ours."""
    safetensors.torch.save_file(classifier.network.state_dict(), tmp_path / "weights.safetensors")
    found = load_published(CARD, tmp_path / "weights.safetensors")
    assert same_state(found.state_dict(), classifier.state_dict())
    save_classifier(found, tmp_path)
    again = read_classifier(tmp_path / "model.safetensors", tmp_path / "model.json")
    assert same_state(again.state_dict(), classifier.state_dict())


def test_half_precision_becomes_single(classifier: Classifier, tmp_path: Path) -> None:
    """Weights that were stored in half precision are computed with in float32."""
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in classifier.network.state_dict().items()
    }
    found = load_published(CARD, _saved(half, tmp_path))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}


def test_parameters_that_do_not_fit_are_named(classifier: Classifier, tmp_path: Path) -> None:
    """What is missing, what is too much and what has another shape is told by name, the first few of each."""
    state = classifier.network.state_dict()
    del state["init_conv.weight"], state["batchnorm.bias"]
    state["sub_block1.weight"] = torch.zeros(1)
    state["logits.weight"] = torch.zeros(100, 64)
    with pytest.raises(DataIntegrityError) as error:
        load_published(CARD, _saved(state, tmp_path))
    text = str(error.value)
    assert "a wide-resnet (depth 10, width 1, activation silu, variant deepmind) with 10 classes" in text
    assert "is missing: init_conv.weight, batchnorm.bias; is not expected: sub_block1.weight; " in text
    assert text.endswith("has another shape: logits.weight (100, 64) (expected (10, 64))")


def test_many_faults_are_counted(tmp_path: Path) -> None:
    """Weights of another network do not fill the screen."""
    with pytest.raises(DataIntegrityError, match=r"is missing: (\S+, ){4}\S+ and \d+ more; is not expected: weight$"):
        load_published(CARD, _saved(nn.Linear(2, 2, bias=False).state_dict(), tmp_path))


def test_another_normalisation_is_refused(classifier: Classifier, tmp_path: Path) -> None:
    """A file that normalises otherwise than its card says would be measured wrongly."""
    state = {**classifier.network.state_dict(), "mu": torch.tensor([0.25, 0.5, 0.5])}
    with pytest.raises(DataIntegrityError, match=r"with mean \(0.25, 0.5, 0.5\), but \(0.25, 0.5, 0.75\) was expected"):
        load_published(CARD, _saved(state, tmp_path))


class _Code:
    """Something whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"state_dict": [1]}, {}], ids=str)
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    """A checkpoint is a mapping of names to tensors, or has one under a usual name."""
    with pytest.raises(DataIntegrityError, match=r"holds no weights; expected a mapping of names to tensors"):
        load_published(CARD, _saved(content, tmp_path))


def test_a_file_never_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only tensors and plain values are read; anything else is refused unread."""
    with pytest.raises(DataIntegrityError, match="cannot be read as tensors and plain values alone"):
        load_published(CARD, _saved({"state_dict": _Code()}, tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_truncated_file_is_refused(name: str, classifier: Classifier, tmp_path: Path) -> None:
    """Half a download is an integrity error that names the file."""
    path = _saved(classifier.network.state_dict(), tmp_path, name)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataIntegrityError, match=rf"{name} cannot be read"):
        load_published(CARD, path)


def test_published_names_are_those_of_the_leaderboard() -> None:
    """A card says everything but the weights; CIFAR-100 has its own names, classes and normalisation."""
    assert published_card("Sehwag2021Proxy_R18").mean == (0.0, 0.0, 0.0)
    assert published_card("Wang2023Better_WRN-28-10").num_classes == 10
    assert published_card("cifar100/Wang2023Better_WRN-28-10").num_classes == 100
    assert published_card("Sehwag2021Proxy").model == WideResnetModel(depth=34, width=10)
    assert {card.image_shape for card in PUBLISHED.values()} == {(3, 32, 32)}


def test_an_unknown_name_is_refused() -> None:
    """The nearest name is told, or all of them when none is near."""
    with pytest.raises(ValueError, match=r"no published classifier 'Sehwag2021Prox'; did you mean 'Sehwag2021Proxy'\?"):
        load_published("Sehwag2021Prox", Path("weights.pt"))
    with pytest.raises(ValueError, match=r"no published classifier 'vit'; names: Bartoldson2024Adversarial_WRN-82-8, "):
        published_card("vit")
