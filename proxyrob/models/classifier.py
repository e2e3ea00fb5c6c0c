"""Building a classifier by its configuration, and keeping it in files."""

from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from pydantic import ValidationError
from torch import Tensor, nn

from proxyrob.config.models import (
    CnnModel,
    ModelConfig,
    PreactResnetModel,
    ResnetModel,
    StandardResnetModel,
    WideResnetModel,
)
from proxyrob.errors import DataIntegrityError
from proxyrob.models.networks import Cnn, Normalise, Resnet
from proxyrob.models.residual import (
    DeepmindPreactResnet,
    DeepmindWideResnet,
    PreactResnet,
    StandardResnet,
    WideResnet,
)
from proxyrob.rng import isolated_rng
from proxyrob.storage import Report, Stage
from proxyrob.storage.bounded import first_fault, read_small
from proxyrob.storage.files import write_bytes, write_json
from proxyrob.types import as_images

MODEL_FILES = ("model.safetensors", "model.json")
BLOCK_PIXELS = 1 << 20  # counted at a time


class ClassifierCard(Report):
    """All that is needed to build a classifier again before its weights are loaded."""

    model: ModelConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """Images in [0,1] to logits; normalisation is the first layer."""

    def __init__(self, card: ClassifierCard) -> None:
        super().__init__()
        self.card = card
        self.normalise = Normalise(card.mean, card.std)
        self.network = _build_network(card)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.network(self.normalise(images))


def _build_network(card: ClassifierCard) -> nn.Module:
    channels, height, width = card.image_shape
    classes = card.num_classes
    match card.model:
        case CnnModel(widths=widths):
            return Cnn(channels, height, width, classes, widths)
        case ResnetModel(widths=widths, blocks_per_stage=blocks):
            return Resnet(channels, classes, widths, blocks)
        case StandardResnetModel(depth=depth, base_channels=base, activation=activation):
            _require_size(card, halvings=3)
            return StandardResnet(channels, classes, depth, base, activation)
        case PreactResnetModel(depth=depth, base_channels=base, activation=activation, variant=variant):
            _require_size(card, halvings=3)
            preact = {"standard": PreactResnet, "deepmind": DeepmindPreactResnet}[variant]
            return preact(channels, classes, depth, base, activation)
        case WideResnetModel(depth=depth, width=factor, activation=activation, variant=variant):
            _require_size(card, halvings=2)
            wide = {"standard": WideResnet, "deepmind": DeepmindWideResnet}[variant]
            return wide(channels, classes, depth, factor, activation)


def _require_size(card: ClassifierCard, halvings: int) -> None:
    smallest, (_, height, width) = 2**halvings, card.image_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"{card.model.kind} halves images {halvings} times: expected at least {smallest}×{smallest} pixels, got "
            f"{height}×{width}; use kind resnet or cnn, whose widths say how often they halve"
        )


def build_classifier(card: ClassifierCard, seed: int) -> Classifier:
    """A classifier with fresh weights; ``seed`` alone decides them.

    Raises ``ValueError`` when the card's images are too small for its network.
    """
    with isolated_rng(seed):
        return Classifier(card)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write weights as safetensors and the card as JSON."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    write_bytes(folder / "model.safetensors", safetensors.torch.save(state))
    write_json(folder / "model.json", classifier.card.model_dump(mode="json"))


def load_classifier(stage: Stage, device: torch.device | str = "cpu") -> Classifier:
    """The classifier a training stage ended with, in eval mode.

    Raises ``DataIntegrityError`` when a file is missing, altered or does not fit its card.
    """
    weights, card_file = (stage.verified(name) for name in MODEL_FILES)
    return read_classifier(weights, card_file).to(device).eval()


def read_classifier(weights: Path, card_file: Path) -> Classifier:
    """A classifier from a pair of files.

    Raises ``DataIntegrityError`` when they do not fit each other.
    """
    try:
        card = ClassifierCard.model_validate_json(read_small(card_file))
        _require_fit(card, weights)
        classifier = Classifier(card)
        classifier.load_state_dict(safetensors.torch.load_file(weights))
    except (ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else error
        raise DataIntegrityError(f"{weights} does not hold the network that {card_file} describes: {reason}") from error
    return classifier


def _require_fit(card: ClassifierCard, weights: Path) -> None:
    """Compare what a card describes with the header of a file of weights, before memory is taken for either.

    Raises ``ValueError`` naming a parameter.
    """
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in Classifier(card).state_dict().items()}
    with safetensors.safe_open(weights, "pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise ValueError(f"{name} has shape {found.get(name)} there, expected {expected.get(name)}")


def channel_statistics(stored: UInt8[np.ndarray, "n h w c"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0,1], of the *training* images, for the normalisation layer.

    The pixels of each of the 256 levels are counted: memory is flat, and neither order nor threads decide a digit.
    """
    num_images, height, width, channels = stored.shape
    counts = np.zeros((channels, 256), np.int64)
    rows = max(1, BLOCK_PIXELS // (height * width))
    for first in range(0, num_images, rows):
        block = stored[first : first + rows]
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    levels = as_images(np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)).flatten().double().numpy()
    num_pixels = num_images * height * width
    mean = (counts * levels).sum(axis=1) / num_pixels
    variance = (counts * (levels - mean[:, None]) ** 2).sum(axis=1) / (num_pixels - 1)
    return tuple(mean.tolist()), tuple(np.sqrt(variance).clip(1e-3).tolist())
