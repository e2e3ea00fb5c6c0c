"""Anybody's model as a stage: what is taken, what is refused and why, and that it stays the same model."""

import pickle
from pathlib import Path

import pytest
import torch

from proxyrob.config import CnnModel, ResnetModel
from proxyrob.errors import DataIntegrityError
from proxyrob.models import (
    ClassifierCard,
    GivenReport,
    build_classifier,
    identify_model,
    is_given,
    load_model,
    published_card,
    save_classifier,
)
from tests.conftest import MakeStage
from tests.somebody import adopted, good, write_onnx_file
from tests.toys import damage, random_images, random_linear

IMAGES, SHAPE = random_images(4), (1, 8, 8)
CARD = ClassifierCard(model=CnnModel(widths=(4,)), image_shape=SHAPE, num_classes=10, mean=(0.5,), std=(0.3,))
HERE = "tests.somebody"


def _ours(folder: Path, card: ClassifierCard = CARD, seed: int = 3) -> Path:
    folder.mkdir()
    save_classifier(build_classifier(card, seed), folder)
    return folder


@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_weights_of_ours(named: str, tmp_path: Path, make_stage: MakeStage) -> None:
    """Given by their folder or their file, they give the same logits in eval mode after the folder is gone."""
    card = ClassifierCard(model=ResnetModel(widths=(4,)), image_shape=SHAPE, num_classes=10, mean=(0.5,), std=(0.3,))
    folder = _ours(tmp_path / "theirs", card)
    stage = adopted(make_stage, str(folder / named))
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(load_model(stage)(IMAGES), build_classifier(card, 3).eval()(IMAGES))
    assert is_given(stage)


def test_a_function(make_stage: MakeStage) -> None:
    """``module:function`` is called again for each use, and has gradients."""
    stage = adopted(make_stage, f"{HERE}:good")
    images = IMAGES.clone().requires_grad_(True)
    load_model(stage)(images).sum().backward()
    assert images.grad is not None
    assert not load_model(stage).training


def test_a_module_of_the_working_directory(tmp_path: Path, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found although a console script does not look there, and the search path is left as it was."""
    (tmp_path / "theirs_alone.py").write_text("from tests.somebody import good as mine\n")
    monkeypatch.chdir(tmp_path)
    adopted(make_stage, "theirs_alone:mine")
    with pytest.raises(ValueError, match=r"somewhere\.else:f: No module named 'somewhere'; is the module's folder this one"):
        identify_model("somewhere.else:f")


def test_a_function_that_returns_another_model(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights than at the beginning are noticed, when it is adopted and when it is loaded."""
    with pytest.raises(DataIntegrityError, match=r"returned another model .* draw none at random"):
        adopted(make_stage, f"{HERE}:drawn")
    stage = adopted(make_stage, f"{HERE}:good")
    monkeypatch.setattr(f"{HERE}.good", lambda: random_linear(seed=1))
    with pytest.raises(DataIntegrityError, match="returned another model"):
        load_model(stage)


def test_an_onnx_file(tmp_path: Path, make_stage: MakeStage) -> None:
    """An ONNX file gives the logits of its network, says that it has no gradients, and is known by its content."""
    path = write_onnx_file(tmp_path / "theirs.onnx")
    stage = adopted(make_stage, str(path))
    report = stage.finished(GivenReport)
    assert report is not None
    path.unlink()
    assert not report.has_gradients
    model = load_model(stage)
    torch.testing.assert_close(model(IMAGES), good()(IMAGES).detach(), rtol=1e-4, atol=1e-4)
    assert report.identity.sha256 in repr(model)
    damage(stage.folder / "model.onnx")
    with pytest.raises(DataIntegrityError, match=r"model\.onnx"):
        load_model(stage)


def test_a_published_checkpoint(tmp_path: Path, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are copied whole; another network's are refused by the names of their parameters."""
    small = published_card("Sehwag2021Proxy_R18").model_copy(update={"model": CnnModel(widths=(4,))})
    monkeypatch.setattr("proxyrob.models.published.PUBLISHED", {"Small": small})
    network = build_classifier(small, 5)
    torch.save(network.network.state_dict(), tmp_path / "theirs.pt")
    stage = adopted(make_stage, str(tmp_path / "theirs.pt"), "Small")
    images = random_images(2, shape=(3, 32, 32))
    assert torch.equal(load_model(stage)(images), network.eval()(images))
    torch.save(random_linear().state_dict(), tmp_path / "other.pt")
    with pytest.raises(DataIntegrityError, match=r"does not hold a cnn .*: is missing: .*; is not expected: weight"):
        adopted(make_stage, str(tmp_path / "other.pt"), "Small")


def test_a_pickle_is_never_loaded(tmp_path: Path, make_stage: MakeStage) -> None:
    """A whole pickled model is refused without running what is in it; the remedy is named."""
    torch.save(random_linear(), tmp_path / "whole.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": Path("b")}))
    for name in ("whole.pt", "plain.pkl"):
        with pytest.raises(DataIntegrityError, match=r"a pickled model is never loaded: save its weights instead"):
            adopted(make_stage, str(tmp_path / name), "Sehwag2021Proxy_R18")


def test_identity_is_that_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights have one identity, others another, whichever way a model is given."""
    before = identify_model(f"{HERE}:good")
    assert identify_model(f"{HERE}:good") == before
    monkeypatch.setattr(f"{HERE}.good", lambda: random_linear(seed=1))
    assert identify_model(f"{HERE}:good").sha256 != before.sha256
    folders = [_ours(tmp_path / str(seed), seed=seed) for seed in (3, 4)]
    assert identify_model(str(folders[0])).sha256 != identify_model(str(folders[1])).sha256


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        (f"{HERE}:nothing", r"returned str; expected a torch\.nn\.Module that takes images in \[0,1\]"),
        (f"{HERE}:failing", r"failed with FileNotFoundError: weights\.pt"),
        (f"{HERE}:missing", "has no attribute 'missing'; is the module's folder this one, or on PYTHONPATH"),
        ("neither", "expected a folder with model.safetensors and model.json, an .onnx file"),
        ("a b:f", "expected a folder with"),
        ("nowhere.onnx", "there is no file nowhere.onnx"),
        ("nowhere.pt", "there is no file or folder nowhere.pt"),
        ("no/where", "there is no file or folder no/where"),
    ],
)
def test_what_is_no_model_is_refused(reference: str, told: str) -> None:
    """The error names the cause and what was expected."""
    with pytest.raises(ValueError, match=told):
        identify_model(reference)


def test_weights_without_a_name_are_refused(tmp_path: Path) -> None:
    """A file of weights alone does not say which network they are of; a file that does needs no name."""
    (tmp_path / "weights.pt").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"say of which published network, e\.g\. --as Sehwag2021Proxy_R18"):
        identify_model(str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="says itself which network it is"):
        identify_model(str(write_onnx_file(tmp_path / "theirs.onnx")), "Sehwag2021Proxy_R18")


def test_onnx_files_that_cannot_be_used(tmp_path: Path, make_stage: MakeStage) -> None:
    """No ONNX at all, and one that takes one image at a time, are refused by name."""
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(DataIntegrityError, match=r"broken\.onnx cannot be read as an ONNX model"):
        adopted(make_stage, str(tmp_path / "broken.onnx"))
    one = write_onnx_file(tmp_path / "one.onnx", batch=1)
    with pytest.raises(DataIntegrityError, match="takes 1 images at a time and no other number"):
        adopted(make_stage, str(one))
