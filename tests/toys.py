"""Small real things to test with: stages, splits, models whose answers are known."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from proxyrob.config import CertifyConfig, DigitsSource, EvaluateConfig, RobustObjective, SmoothObjective
from proxyrob.config.base import digest_of
from proxyrob.label.rule import AGREE, UNSURE
from proxyrob.mix import SyntheticSet
from proxyrob.shards import (
    ShardManifest,
    describe_shards,
    read_manifest,
    read_side_index,
    read_side_table,
    shard_name,
    write_manifest,
    write_shard,
    write_side_index,
    write_side_table,
)
from proxyrob.source import SourceReport, Split
from proxyrob.source.splits import SplitName, write_splits
from proxyrob.storage import DataPlace, Stage
from proxyrob.threat import Threat, parse_threat
from proxyrob.train import LossParts, losses_on, perturb_images

SMALL_DIGITS = DigitsSource(num_train=60, num_validation=30, num_test=60)
SMALL_THREAT = parse_threat("linf:0.2")
SMALL_EVALUATE = EvaluateConfig(pgd_steps=5, batch_size=16)
SMALL_CERTIFY = CertifyConfig(num_images=25, n0=20, n=200, alpha=0.01, radii=(0.0, 0.25), batch_size=64)
SMALL_SIGMA = 0.25
REAL_ONLY = ("proxy=null", "train.synthetic_fraction=0", "train.gamma=1", "smooth.synthetic_fraction=0", "smooth.gamma=1")
"""Changes to a configuration that leave real images alone."""


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
    """Flip the last byte of a file, also of a read-only one.

    The damaged file is another inode: one that is written and damaged within a tick of the clock would else look unchanged.
    """
    content = path.read_bytes()
    other = path.with_name(f"{path.name}.damaged")
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))
    other.replace(path)


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too, but for the hashes that are kept beside files of a data set."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in files if not (path.name.startswith(".") and path.suffix == ".sha256")}


def tiny_split(count: int = 30, *, classes: int = 10, shape: tuple[int, int, int] = (4, 4, 1), seed: int = 0) -> Split:
    """Random images (h, w, c), the classes in turn."""
    stored = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return Split(stored, np.arange(count, dtype=np.int64) % classes)


def write_source(
    stage: Stage, split: Split, *, test: Split | None = None, class_names: tuple[str, ...] | None = None
) -> SourceReport:
    """A finished source whose splits are all ``split``, or whose test split is ``test``; classes are numbered without names."""
    splits: dict[SplitName, tuple[np.ndarray, np.ndarray]] = {
        "train": (split.stored, split.labels),
        "validation": (split.stored, split.labels),
        "test": (split.stored, split.labels) if test is None else (test.stored, test.labels),
    }
    names = class_names or tuple(str(k) for k in range(int(split.labels.max()) + 1))
    return write_splits(stage, splits, class_names=names)


def cut_shards(count: int, shard_size: int) -> list[tuple[str, int, int]]:
    """Name, first image and number of images of each shard of a set."""
    return [(shard_name(k), first, min(shard_size, count - first)) for k, first in enumerate(range(0, count, shard_size))]


def write_images(place: DataPlace, images: UInt8[np.ndarray, "n h w c"], *, shard_size: int = 5) -> ShardManifest:
    """A set of images, in shards."""
    shards = cut_shards(len(images), shard_size)
    for name, first, number in shards:
        write_shard(place, name, images[first : first + number])
    shape = images.shape[1:]
    about: dict[str, Any] = {"generator": "generator", "source_sha256": "source", "sampler": {"kind": "toy"}, "seed": 3}
    manifest = describe_shards(place, shards=shards, image_shape=(shape[0], shape[1], shape[2]), **about)
    write_manifest(place, manifest)
    return manifest


def write_set(
    folder: Path,
    images: UInt8[np.ndarray, "n h w c"],
    labels: np.ndarray,
    *,
    kept: np.ndarray | None = None,
    columns: dict[str, np.ndarray] | None = None,
    shard_size: int = 5,
    num_classes: int = 10,
    weight: float = 1.0,
    name: str = "synthetic",
) -> SyntheticSet:
    """A labelled set of images in ``folder``; ``columns`` are more columns of its side tables."""
    place = DataPlace.of(folder)
    manifest, beside = write_images(place, images, shard_size=shard_size), place.below("labels/toy")
    keeps = np.ones(len(images), bool) if kept is None else kept
    table = pd.DataFrame({"id": np.arange(len(images)), "label": labels, "kept": keeps, **(columns or {})})
    table["reason"] = np.where(keeps, AGREE, UNSURE)
    for shard in manifest.shards:
        write_side_table(beside, shard.name, table.iloc[shard.first_id : shard.first_id + shard.num_images])
    write_side_index(beside, manifest, {"rule": "toy"}, [str(k) for k in range(num_classes)])
    return SyntheticSet(place, beside, weight, name)


def read_images(place: DataPlace) -> UInt8[np.ndarray, "n h w c"]:
    """All images of a set of plain files, read without the library's reader."""
    return np.concatenate([np.load(Path(place.uri) / shard.key) for shard in read_manifest(place).shards])


def compute_losses(
    objective: RobustObjective | SmoothObjective,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: Threat | None,
    scale: float,
    generator: torch.Generator,
) -> LossParts:
    """The loss of each image, as a step of training takes it: ``perturb_images``, then ``losses_on`` what it gives."""
    batch = perturb_images(objective, model, images, labels, threat=threat, scale=scale, generator=generator)
    return losses_on(objective, model, batch)


def read_labels(images: DataPlace, labels: DataPlace) -> pd.DataFrame:
    """The side tables of all shards in the order of the images."""
    index = read_side_index(labels, read_manifest(images))
    return pd.concat([read_side_table(labels, entry) for entry in index.tables], ignore_index=True)


class Linear(nn.Module):
    """Logits that are linear in the pixels: every optimum of an attack on it is known in closed form."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


class Scripted(nn.Module):
    """Answers the given classes one after another, whatever it is shown."""

    def __init__(self, answers: list[int], num_classes: int) -> None:
        super().__init__()
        self.answers, self.num_classes, self.seen = torch.tensor(answers), num_classes, 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return torch.eye(self.num_classes)[self.answers[self.seen - len(images) : self.seen]]


def random_linear(*, classes: int = 10, pixels: int = 64, seed: int = 0) -> Linear:
    """A linear model with normal weights."""
    generator = torch.Generator().manual_seed(seed)
    return Linear(torch.randn((classes, pixels), generator=generator), torch.randn(classes, generator=generator))


def random_images(count: int, *, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Tensor:
    """Uniform images (c, h, w) in [0,1]."""
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed))


def middle_images(count: int, *, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Tensor:
    """Uniform images (c, h, w) in [0.3, 0.7], far from the edges of [0,1]."""
    return 0.3 + 0.4 * random_images(count, shape=shape, seed=seed)


def breakable(model: Linear, images: Tensor, threat: Threat) -> Tensor:
    """Which images of a linear model can be broken, where the edges of [0,1] are too far to matter.

    Towards class t the logits' difference rises by at most ε·‖w_t − w_y‖, in the dual norm.
    """
    with torch.no_grad():
        logits = model(images)
        labels = logits.argmax(1)
        difference = model.weight[None] - model.weight[labels][:, None]
        dual = difference.abs().sum(2) if threat.norm == "linf" else difference.norm(dim=2)
        reached = logits - logits.gather(1, labels[:, None]) + float(threat.epsilon) * dual
        return reached.scatter(1, labels[:, None], -torch.inf).amax(1) > 0


class Watched(nn.Module):
    """A model that remembers every image it was shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.shown: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(images.detach().flatten(1).clone())
        return self.model(images)

    def take(self) -> Tensor:
        """The images since the last time, one in a row."""
        shown, self.shown = torch.cat(self.shown), []
        return shown


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """The classes that a model gives."""
    with torch.no_grad():
        return model(images).argmax(1)


def largest_norm(attacked: Tensor, images: Tensor, threat: Threat) -> float:
    """The length of the largest perturbation."""
    delta = (attacked - images).flatten(1)
    return float((delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)).max())


def same_rows(some: Tensor, others: Tensor) -> bool:
    """Whether every row of ``some`` is also one of ``others``, to the last bit."""
    return {row.numpy().tobytes() for row in some} <= {row.numpy().tobytes() for row in others}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def join(lines: Iterable[str]) -> str:
    """Lines of a file."""
    return "\n".join(lines) + "\n"
