"""Robust classifiers of the literature, from the checkpoints that their authors publish."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from proxyrob.config.models import ModelConfig, PreactResnetModel, StandardResnetModel, WideResnetModel
from proxyrob.errors import DataIntegrityError
from proxyrob.models.classifier import Classifier, ClassifierCard, build_classifier
from proxyrob.storage.tensors import read_tensors

_NOT_NORMALISED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

_WRAPPERS = ("module.", "_orig_mod.", "model.", "1.")
"""What parallel, compiled and normalised models put before every name (``1.`` is the second part of an ``nn.Sequential``)."""

_CONTAINERS = ("state_dict", "model_state_dict", "model")
"""Where checkpoints keep the weights when they hold more than weights."""

_NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}

_NAMES_TOLD = 5


def _card(model: ModelConfig, normalisation: tuple[tuple[float, ...], tuple[float, ...]], num_classes: int) -> ClassifierCard:
    mean, std = normalisation
    return ClassifierCard(model=model, image_shape=(3, 32, 32), num_classes=num_classes, mean=mean, std=std)


def _published() -> dict[str, ClassifierCard]:
    resnet_18, wide_34_10 = StandardResnetModel(depth=18), WideResnetModel(depth=34, width=10)
    preact_18 = PreactResnetModel(depth=18, activation="silu", variant="deepmind")
    deepmind = {
        (depth, width): WideResnetModel(depth=depth, width=width, activation="silu", variant="deepmind")
        for depth, width in ((28, 10), (34, 20), (70, 16), (82, 8), (94, 16), (106, 16))
    }
    cards = {
        "Standard": _card(WideResnetModel(depth=28, width=10), _NOT_NORMALISED, 10),
        "Sehwag2021Proxy": _card(wide_34_10, _NOT_NORMALISED, 10),
        "Sehwag2021Proxy_R18": _card(resnet_18, _NOT_NORMALISED, 10),
        "cifar100/Sehwag2021Proxy": _card(wide_34_10, _NOT_NORMALISED, 100),
    }
    cifar10 = {
        "Bartoldson2024Adversarial_WRN-82-8": deepmind[82, 8],
        "Bartoldson2024Adversarial_WRN-94-16": deepmind[94, 16],
        "Gowal2020Uncovering": deepmind[70, 16],
        "Gowal2020Uncovering_28_10_extra": deepmind[28, 10],
        "Gowal2020Uncovering_34_20": deepmind[34, 20],
        "Gowal2020Uncovering_70_16": deepmind[70, 16],
        "Gowal2020Uncovering_70_16_extra": deepmind[70, 16],
        "Gowal2020Uncovering_extra": deepmind[70, 16],
        "Gowal2021Improving_28_10_ddpm_100m": deepmind[28, 10],
        "Gowal2021Improving_70_16_ddpm_100m": deepmind[70, 16],
        "Gowal2021Improving_R18_ddpm_100m": preact_18,
        "Rebuffi2021Fixing_106_16_cutmix_ddpm": deepmind[106, 16],
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": deepmind[28, 10],
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": deepmind[70, 16],
        "Rebuffi2021Fixing_70_16_cutmix_extra": deepmind[70, 16],
        "Rebuffi2021Fixing_R18_cutmix_ddpm": preact_18,
        "Rebuffi2021Fixing_R18_ddpm": preact_18,
        "Wang2023Better_WRN-28-10": deepmind[28, 10],
        "Wang2023Better_WRN-70-16": deepmind[70, 16],
    }
    cifar100 = {
        "Gowal2020Uncovering": deepmind[70, 16],
        "Gowal2020Uncovering_extra": deepmind[70, 16],
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": deepmind[28, 10],
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": deepmind[70, 16],
        "Rebuffi2021Fixing_R18_ddpm": preact_18,
        "Wang2023Better_WRN-28-10": deepmind[28, 10],
        "Wang2023Better_WRN-70-16": deepmind[70, 16],
    }
    cards |= {name: _card(model, _CIFAR10, 10) for name, model in cifar10.items()}
    return cards | {f"cifar100/{name}": _card(model, _CIFAR100, 100) for name, model in cifar100.items()}


PUBLISHED: Mapping[str, ClassifierCard] = MappingProxyType(_published())
"""Checkpoints by their names on RobustBench; those for CIFAR-100 have ``cifar100/`` before them."""


def load_published(name_or_card: str | ClassifierCard, path: Path) -> Classifier:
    """The classifier of a published checkpoint, in eval mode.

    ``name_or_card`` is a name in ``PUBLISHED``, or a card that says what the file holds. The file is safetensors
    (``.safetensors``) or torch's own, of which tensors and plain values alone are read; half precision becomes float32.
    Names may lie below ``module.`` or ``model.``, and a normalisation may lie beside the network's parameters.

    Raises ``ValueError`` for an unknown name, and ``DataIntegrityError`` naming the parameters when the file lacks some,
    has others, or has them in other shapes, and when it normalises images otherwise than the card says.
    """
    card = published_card(name_or_card) if isinstance(name_or_card, str) else name_or_card
    state, normalisation = _split(_read_state(path))
    for name, value in normalisation.items():
        _require_equal_normalisation(path, name, value, card)
    classifier = build_classifier(card, seed=0)
    expected = classifier.network.state_dict()
    faults = {
        "is missing": [name for name in expected if name not in state and not name.endswith("num_batches_tracked")],
        "is not expected": [name for name in state if name not in expected],
        "has another shape": [
            f"{name} {tuple(state[name].shape)} (expected {tuple(tensor.shape)})"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{fault}: {_shorten(names)}" for fault, names in faults.items() if names)
        raise DataIntegrityError(f"{path} does not hold {_describe(card)}: {told}")
    classifier.network.load_state_dict(state, strict=False)  # checkpoints of old torch do not count their batches
    return classifier.eval()


def published_card(name: str) -> ClassifierCard:
    """What the published checkpoint of that name holds.

    Raises ``ValueError`` with the nearest name when there is none.
    """
    if name not in PUBLISHED:
        nearest = difflib.get_close_matches(name, list(PUBLISHED), n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; names: {', '.join(sorted(PUBLISHED))}"
        raise ValueError(f"there is no published classifier {name!r}{hint}")
    return PUBLISHED[name]


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content: Any = read_tensors(path)
    except (DataIntegrityError, safetensors.SafetensorError) as error:
        raise DataIntegrityError(
            f"{path} cannot be read as tensors and plain values alone ({error}); a pickled model is never loaded: save its "
            "weights instead, torch.save(model.state_dict(), …)"
        ) from error
    while isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        content = next((content[name] for name in _CONTAINERS if name in content), None)
    if not isinstance(content, Mapping) or not content:
        raise DataIntegrityError(
            f"{path} holds no weights; expected a mapping of names to tensors, itself or under {' or '.join(_CONTAINERS)}"
        )
    return dict(content)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's own parameters under their own names, and the normalisation's."""
    network, normalisation = {}, {}
    for name, tensor in state.items():
        last = name.rpartition(".")[2]
        if last in _NORMALISATION:
            normalisation[_NORMALISATION[last]] = tensor
        else:
            network[name] = tensor
    while network and (found := next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in network)), "")):
        network = {name.removeprefix(found): tensor for name, tensor in network.items()}
    return network, normalisation


def _require_equal_normalisation(path: Path, name: str, value: Tensor, card: ClassifierCard) -> None:
    found, expected = value.double().flatten().tolist(), card.mean if name == "mean" else card.std
    if len(found) != len(expected) or not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, expected, strict=True)):
        raise DataIntegrityError(
            f"{path} normalises images with {name} {tuple(round(part, 6) for part in found)}, but {expected} was expected; "
            f"give a card with the file's own {name}"
        )


def _describe(card: ClassifierCard) -> str:
    values = ", ".join(f"{name} {value}" for name, value in card.model.dump().items() if name != "kind")
    return f"a {card.model.kind} ({values}) with {card.num_classes} classes"


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    return ", ".join(names[:_NAMES_TOLD]) + more
