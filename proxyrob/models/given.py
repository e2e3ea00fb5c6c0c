"""Anybody's model, kept as a stage like one of our own trainings: a checkpoint, a function that returns a model, ONNX."""

import importlib
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor, nn

from proxyrob.errors import DataIntegrityError
from proxyrob.models.classifier import MODEL_FILES, Classifier, load_classifier, read_classifier, save_classifier
from proxyrob.models.hashing import hash_model
from proxyrob.models.onnx_files import require_whole_onnx
from proxyrob.models.published import load_published
from proxyrob.storage import Report, Stage
from proxyrob.storage.bounded import first_fault, read_small
from proxyrob.storage.files import sha256_of, write_json

GIVEN = "given"
"""The name of a stage that keeps such a model: of any other, such as a training, no file makes one."""

ONNX_FILE = "model.onnx"
CARD_FILE = "given.json"
WEIGHTS = (".pt", ".pth", ".safetensors", ".ckpt", ".pkl")

ModelKind = Literal["ours", "published", "onnx", "function"]


class ModelIdentity(Report):
    """What a given model is: its kind, where it was found, and the hash of its files or, of a function, of what it returns."""

    kind: ModelKind
    reference: str
    published_as: str | None
    sha256: str

    def about(self) -> dict[str, Any]:
        """What decides the digest of its stage: where a file lies is no part of it, what a function is called is."""
        return {key: value for key, value in self.model_dump().items() if key != "reference" or self.kind == "function"}


class GivenReport(Report):
    """A model from elsewhere. Without gradients only black-box attacks can be run on it."""

    identity: ModelIdentity
    has_gradients: bool


class OnnxModel(nn.Module):
    """An ONNX file as a module without gradients; its one input takes images, its one output gives logits."""

    def __init__(self, path: Path) -> None:
        """Raises ``DataIntegrityError`` when the file is no ONNX model with one input, for any number of images, and one
        output, and when it keeps weights in other files."""
        super().__init__()
        require_whole_onnx(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own that share nothing but Exception
            raise DataIntegrityError(f"{path} cannot be read as an ONNX model: {error}") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise DataIntegrityError(
                f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; expected one of each: images and logits"
            )
        if inputs[0].shape and isinstance(inputs[0].shape[0], int):
            raise DataIntegrityError(
                f"{path} takes {inputs[0].shape[0]} images at a time and no other number; export it with a dynamic batch"
            )
        self.input, self.output = inputs[0].name, outputs[0].name
        self.sha256 = sha256_of(path)

    def extra_repr(self) -> str:
        """The file's hash stands for the weights, which are no parameters of this module."""
        return f"sha256={self.sha256}"

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        given = np.ascontiguousarray(images.detach().cpu().numpy())
        return torch.from_numpy(np.asarray(self.session.run([self.output], {self.input: given})[0])).to(images.device)


def identify_model(reference: str, published_as: str | None = None) -> ModelIdentity:
    """What a model is that somebody names, and what decides the digest of its stage.

    ``reference`` is a folder with ``model.safetensors`` and ``model.json``, or the first of these files; an ``.onnx`` file;
    another file with weights (a published checkpoint, whose name on RobustBench is ``published_as``); or
    ``module:function``, which is imported and called. Raises ``ValueError`` when it is none of these, or the function does
    not return a module, and ``DataIntegrityError`` when an ONNX file cannot be read or is not the whole model.
    """
    path = Path(reference)
    if published_as is not None:
        if path.is_dir() or path.suffix == ".onnx":
            raise ValueError(f"{path} says itself which network it is; give it without --as {published_as}")
        return ModelIdentity(
            kind="published", reference=reference, published_as=published_as, sha256=sha256_of(_existing(path))
        )
    if (folder := _folder_of_ours(path)) is not None:
        sha256 = " ".join(sha256_of(_existing(folder / name)) for name in MODEL_FILES)
        return ModelIdentity(kind="ours", reference=str(folder), published_as=None, sha256=sha256)
    if path.suffix == ".onnx":
        require_whole_onnx(_existing(path))
        return ModelIdentity(kind="onnx", reference=reference, published_as=None, sha256=sha256_of(_existing(path)))
    if path.is_file():
        raise ValueError(
            f"{path} holds weights, if anything; say of which published network, e.g. --as Sehwag2021Proxy_R18, or give a "
            "function that returns the model with them: module:function"
        )
    if path.suffix in WEIGHTS or "/" in reference:
        raise ValueError(f"there is no file or folder {reference}")
    return ModelIdentity(kind="function", reference=reference, published_as=None, sha256=hash_model(call_function(reference)))


def adopt_model(identity: ModelIdentity, *, stage: Stage) -> GivenReport:
    """Load a model once, and keep what is needed to load it again.

    Networks of ours, published ones and ONNX files are copied whole; of a function its name and the hash of what it returns
    are kept. Raises ``ValueError`` for an unknown published name, and ``DataIntegrityError`` when a file cannot be read or
    holds another network.
    """
    if (report := stage.finished(GivenReport)) is not None:
        return report
    started = time.monotonic()
    stage.folder.mkdir(parents=True, exist_ok=True)
    path = Path(identity.reference)
    classifier: Classifier | None = None
    files = [CARD_FILE]
    match identity.kind:
        case "published":
            assert identity.published_as is not None
            classifier = load_published(identity.published_as, path)
        case "ours":
            classifier = read_classifier(path / MODEL_FILES[0], path / MODEL_FILES[1])
        case "onnx":
            OnnxModel(path)
            shutil.copyfile(path, stage.folder / ONNX_FILE)
            files.append(ONNX_FILE)
        case "function":
            _require_same(identity, call_function(identity.reference))
    if classifier is not None:
        save_classifier(classifier, stage.folder)
        files += MODEL_FILES
    write_json(stage.folder / CARD_FILE, identity.model_dump(mode="json"))
    return stage.finish(GivenReport(identity=identity, has_gradients=identity.kind != "onnx"), files, started)


def load_model(stage: Stage, device: torch.device | str = "cpu") -> nn.Module:
    """The classifier of a training stage, or the model that was given, in eval mode.

    ``stage`` of a given model has what identifies it in its configuration (``ModelIdentity.about``). Raises
    ``DataIntegrityError`` when a file is missing or altered, or a function returns another model than it did.
    """
    if not is_given(stage):
        return load_classifier(stage, device)
    path = stage.verified(CARD_FILE)
    try:
        identity = ModelIdentity.model_validate_json(read_small(path))
    except ValidationError as error:
        raise DataIntegrityError(f"{path} does not describe a model ({first_fault(error)}); {stage.remedy}") from error
    if identity.about() != stage.configuration.get("model"):
        raise DataIntegrityError(f"{path} describes another model than the one that was given; {stage.remedy}")
    match identity.kind:
        case "ours" | "published":
            return load_classifier(stage, device)
        case "onnx":
            return OnnxModel(stage.verified(ONNX_FILE)).eval()
        case "function":
            model = call_function(identity.reference)
            _require_same(identity, model)
            return model.to(device)


def is_given(stage: Stage) -> bool:
    """Whether a model comes from elsewhere, so that nobody here knows how it was trained."""
    return stage.name == GIVEN


def call_function(reference: str) -> nn.Module:
    """The model that ``module:function`` returns, in eval mode; modules of the working directory are found, too.

    Raises ``ValueError`` when there is no such function, when it fails, and when it returns something else.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(
            f"{reference!r} is no model: expected a folder with {' and '.join(MODEL_FILES)}, an .onnx file, a checkpoint with "
            "--as NAME, or module:function"
        )
    with _working_directory_importable():
        try:
            function = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{reference}: {error}; is the module's folder this one, or on PYTHONPATH?") from error
        try:
            model = function()
        except Exception as error:  # whatever somebody's function raises, a person needs to know that it was this function
            raise ValueError(f"{reference}() failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(  # noqa: TRY004  (what is wrong is the function's name, a value)
            f"{reference}() returned {type(model).__name__}; expected a torch.nn.Module that takes images in [0,1] and returns "
            "logits"
        )
    return model.eval()


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """A console script, unlike ``python -m``, does not look for modules in the working directory."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _require_same(identity: ModelIdentity, model: nn.Module) -> None:
    if (found := hash_model(model)) != identity.sha256:
        raise DataIntegrityError(
            f"{identity.reference} returned another model (sha256 {found[:12]}) than at first ({identity.sha256[:12]}); it has "
            "to return the same weights each time: load them from a file, and draw none at random"
        )


def _folder_of_ours(path: Path) -> Path | None:
    """The folder of a network of ours, given itself or by its file of weights."""
    if path.is_dir():
        return path
    is_ours = path.name == MODEL_FILES[0] and (path.parent / MODEL_FILES[1]).is_file()
    return path.parent if is_ours else None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path
