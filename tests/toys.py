"""Small real things to test with: stages, splits, models whose answers are known."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from proxyrob.config import CertifyConfig, DigitsSource, EvaluateConfig
from proxyrob.config.base import digest_of
from proxyrob.source import Split
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat

SMALL_DIGITS = DigitsSource(num_train=60, num_validation=30, num_test=60)
SMALL_THREAT = parse_threat("linf:0.2")
SMALL_EVALUATE = EvaluateConfig(pgd_steps=5, batch_size=16)
SMALL_CERTIFY = CertifyConfig(num_images=25, n0=20, n=200, alpha=0.01, radii=(0.0, 0.25), batch_size=64)
SMALL_SIGMA = 0.25


class StopHereError(Exception):
    """Stands for a kill: raised from a progress callback, so that a stage ends where it is."""


class Killer:
    """An ``OnProgress`` that ends the work as soon as ``condition(done)`` holds, and remembers every call."""

    def __init__(self, condition: Callable[[int], bool]) -> None:
        self.condition = condition
        self.told: list[int] = []

    def __call__(self, done: int, total: int, **figures: float) -> None:
        self.told.append(done)
        if self.condition(done):
            raise StopHereError(f"killed at {done} of {total}")


class Recorder:
    """An ``OnProgress`` that remembers every call and its figures."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.figures: list[dict[str, float]] = []

    def __call__(self, done: int, total: int, **figures: float) -> None:
        self.told.append((done, total))
        self.figures.append(figures)


def stage_in(folder: Path, name: str, **configuration: Any) -> Stage:
    """A stage of its own folder below ``folder``; equal configurations give equal stages."""
    digest = digest_of({"stage": name, **configuration})
    return Stage(name=name, digest=digest, folder=folder / name / digest[:16], configuration=configuration)


def damage(path: Path) -> None:
    """Flip the last byte of a file, also of a read-only one."""
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def tiny_split(count: int = 30, *, classes: int = 10, shape: tuple[int, int, int] = (4, 4, 1), seed: int = 0) -> Split:
    """Random images (h, w, c), the classes in turn."""
    stored = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return Split(stored, np.arange(count, dtype=np.int64) % classes)


class Linear(nn.Module):
    """Logits that are linear in the pixels: every optimum of an attack on it is known in closed form."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def random_linear(*, classes: int = 10, pixels: int = 64, seed: int = 0) -> Linear:
    """A linear model with normal weights."""
    generator = torch.Generator().manual_seed(seed)
    return Linear(torch.randn((classes, pixels), generator=generator), torch.randn(classes, generator=generator))


def random_images(count: int, *, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Tensor:
    """Uniform images (c, h, w) in [0,1]."""
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed))


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def join(lines: Iterable[str]) -> str:
    """Lines of a file."""
    return "\n".join(lines) + "\n"
