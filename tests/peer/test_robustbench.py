"""Our networks against RobustBench's: the same weights give the same logits, under the same names.

RobustBench is not among the pinned packages, because its wheel brings a package ``tests`` that would hide ours. It is read
from ``$PROXYROB_PEERS/robustbench``: a checkout, or what this puts there::

    uv pip install --no-deps --target "$PROXYROB_PEERS/robustbench" robustbench==1.1.1
"""

import ast
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from proxyrob.config import ModelConfig
from proxyrob.config.models import PreactResnetModel, StandardResnetModel, WideResnetModel
from proxyrob.models import PUBLISHED, Classifier, ClassifierCard, build_classifier, load_published, published_card
from tests.toys import random_images, same_state

ZOO = Path(os.environ.get("PROXYROB_PEERS", "/nonexistent")) / "robustbench" / "robustbench" / "model_zoo"

pytestmark = pytest.mark.skipif(not ZOO.is_dir(), reason="no RobustBench in $PROXYROB_PEERS/robustbench (see this file's head)")

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR = (3, 32, 32)


@cache
def _peer(name: str) -> ModuleType:
    """A file of theirs by itself: their package imports timm and downloaders before anything else."""
    spec = importlib.util.spec_from_file_location(f"robustbench_{name}", ZOO / "architectures" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _randomise(network: nn.Module, seed: int) -> None:
    """Random values for everything, running statistics included, that keep logits near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_var", "bn1.weight", "bn2.weight", "batchnorm_0.weight", "batchnorm_1.weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean") or tensor.ndim == 1:
                tensor.normal_(0.0, 0.1, generator=generator)
            elif tensor.ndim > 1:
                tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5, generator=generator)


def _card(model: ModelConfig, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> ClassifierCard:
    return ClassifierCard(model=model, image_shape=CIFAR, num_classes=10, mean=mean, std=std)


def _unnormalised(model: ModelConfig) -> ClassifierCard:
    return _card(model, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _deepmind(kind: str, **values: Any) -> nn.Module:
    return getattr(_peer("dm_wide_resnet"), kind)(mean=MEAN, std=STD, **values)


def _silu() -> type[nn.Module]:
    return _peer("dm_wide_resnet").Swish


def _preact() -> nn.Module:
    theirs = _peer("resnet")
    return theirs.PreActResNet(theirs.PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True)


PAIRS: dict[str, tuple[ClassifierCard, Callable[[], nn.Module]]] = {
    "Sehwag2021Proxy_R18": (published_card("Sehwag2021Proxy_R18"), lambda: _peer("resnet").ResNet18()),
    "Rebuffi2021Fixing_R18_ddpm": (
        published_card("Rebuffi2021Fixing_R18_ddpm"),
        lambda: _deepmind("DMPreActResNet", depth=18, activation_fn=_silu()),
    ),
    "ResNet-34": (_unnormalised(StandardResnetModel(depth=34)), lambda: _peer("resnet").ResNet34()),
    "ResNet-50": (_unnormalised(StandardResnetModel(depth=50)), lambda: _peer("resnet").ResNet50()),
    "PreActResNet-18": (_unnormalised(PreactResnetModel(depth=18)), _preact),
    "WRN-16-2": (_unnormalised(WideResnetModel(depth=16, width=2)), lambda: _peer("wide_resnet").WideResNet(16, 10, 2)),
    "WRN-16-1": (_unnormalised(WideResnetModel(depth=16, width=1)), lambda: _peer("wide_resnet").WideResNet(16, 10, 1)),
    "WRN-16-2-deepmind": (
        _card(WideResnetModel(depth=16, width=2, variant="deepmind")),
        lambda: _deepmind("DMWideResNet", depth=16, width=2),
    ),
    "WRN-22-1-deepmind-silu": (
        _card(WideResnetModel(depth=22, width=1, variant="deepmind", activation="silu")),
        lambda: _deepmind("DMWideResNet", depth=22, width=1, activation_fn=nn.SiLU),
    ),
}

LARGE_PAIRS: dict[str, tuple[ClassifierCard, Callable[[], nn.Module]]] = {
    "Sehwag2021Proxy": (published_card("Sehwag2021Proxy"), lambda: _peer("wide_resnet").WideResNet(34, 10, 10)),
    "Wang2023Better_WRN-28-10": (
        published_card("Wang2023Better_WRN-28-10"),
        lambda: _deepmind("DMWideResNet", depth=28, width=10, activation_fn=nn.SiLU),
    ),
    "Rebuffi2021Fixing_28_10_cutmix_ddpm": (
        published_card("Rebuffi2021Fixing_28_10_cutmix_ddpm"),
        lambda: _deepmind("DMWideResNet", depth=28, width=10, activation_fn=_silu()),
    ),
    "Gowal2021Improving_28_10_ddpm_100m": (
        published_card("Gowal2021Improving_28_10_ddpm_100m"),
        lambda: _deepmind("DMWideResNet", depth=28, width=10, activation_fn=_silu()),
    ),
}


@pytest.mark.parametrize("name", [*PAIRS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE_PAIRS)])
def test_the_same_weights_give_the_same_logits(name: str, tmp_path: Path) -> None:
    """Their checkpoint, loaded into ours: logits agree to 1e-10 of their size in float64, and so does training mode."""
    card, make = (PAIRS | LARGE_PAIRS)[name]
    theirs = make()
    _randomise(theirs, seed=1)
    torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "w.pt")
    ours = load_published(card, tmp_path / "w.pt").double()
    theirs = theirs.double().eval()
    images = random_images(2, shape=CIFAR).double()
    with torch.no_grad():
        _require_equal(ours(images), theirs(images))
        _require_equal(ours.train()(images), theirs.train()(images))
    after = ours.network.state_dict()
    assert all(torch.allclose(after[key], value, rtol=1e-10, atol=1e-12) for key, value in theirs.state_dict().items())


def _require_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    size = float(theirs.abs().max())
    assert size > 1e-3
    assert float((ours - theirs).abs().max()) <= 1e-10 * size


def test_our_weights_load_into_theirs() -> None:
    """What we train can be handed to RobustBench: names and shapes are equal in both directions."""
    for card, make in PAIRS.values():
        ours, theirs = build_classifier(card, seed=0).network, make()
        theirs.load_state_dict(ours.state_dict())
        assert same_state(dict(theirs.state_dict()), dict(ours.state_dict()))


@pytest.mark.parametrize(("file", "prefix"), [("cifar10", ""), ("cifar100", "cifar100/")])
def test_every_published_name_is_theirs(file: str, prefix: str) -> None:
    """Each name stands in RobustBench's own list, for a network of the same parameters, activation and normalisation."""
    cards = {name.removeprefix(prefix): card for name, card in PUBLISHED.items() if ("/" in name) == bool(prefix)}
    found = set()
    for name, expression in _entries(ZOO / f"{file}.py"):
        if name not in cards:
            continue
        card = cards[name]
        with torch.device("meta"):
            theirs, values = _make(expression)
            ours = Classifier(card).network
        assert _shapes(ours) == _shapes(theirs)
        assert (values.get("mean", (0.0, 0.0, 0.0)), values.get("std", (1.0, 1.0, 1.0))) == (card.mean, card.std)
        smooth = values.get("activation_fn", nn.ReLU) is not nn.ReLU
        assert smooth == (not any(isinstance(module, nn.ReLU) for module in ours.modules()))
        found.add(name)
    assert found == cards.keys()


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _entries(path: Path) -> Iterator[tuple[str, ast.expr]]:
    """The names in a list of theirs, and what each calls its model."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Tuple(elts=[ast.Constant(value=str(name)), ast.Dict(keys=keys, values=values)]):
                yield from (
                    (name, value)
                    for key, value in zip(keys, values, strict=True)
                    if isinstance(key, ast.Constant) and key.value == "model"
                )


def _make(expression: ast.expr) -> tuple[nn.Module, dict[str, Any]]:
    """The network that an entry of theirs makes, and the named arguments it makes it with."""
    arguments: dict[str, Any] = {}

    def recorded(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def make(*positional: Any, **named: Any) -> nn.Module:
            arguments.update(named)
            return kind(*positional, **named)

        return make

    wide, deepmind, resnet = _peer("wide_resnet"), _peer("dm_wide_resnet"), _peer("resnet")
    names = {
        "nn": nn,
        "WideResNet": recorded(wide.WideResNet),
        "ResNet18": recorded(resnet.ResNet18),
        **{name: recorded(getattr(deepmind, name)) for name in ("DMWideResNet", "DMPreActResNet")},
        **{name: getattr(deepmind, name) for name in ("Swish", "CIFAR10_MEAN", "CIFAR10_STD", "CIFAR100_MEAN", "CIFAR100_STD")},
    }
    make = eval(compile(ast.Expression(expression), "robustbench", "eval"), names)  # noqa: S307  (a checkout that was named)
    return make(), arguments
