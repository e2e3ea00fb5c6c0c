"""What is looked at while training runs: accuracy on validation images, and which weights were best there."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.device import eval_mode, has_batchnorm
from proxyrob.rng import Streams
from proxyrob.source import Split
from proxyrob.threat import Threat
from proxyrob.train.reading import Reader
from proxyrob.train.stopping import NEVER, Stop

PGD_STEPS = 10
RELATIVE_STEP = 0.25
BATCH_SIZE = 512


@dataclass
class Selection:
    """The curve so far, and the averaged weights with the best score (the earlier ones where two are equal)."""

    curve: list[dict[str, float]] = field(default_factory=list)
    score: float = -math.inf
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, row: dict[str, float], model: nn.Module) -> None:
        """Add a row to the curve, and keep a copy of the weights of ``model`` if none before had its score."""
        self.curve.append(row)
        if score_of(row) > self.score:
            self.score, self.step = score_of(row), int(row["step"])
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def has(self, step: int) -> bool:
        """Whether the curve goes up to ``step``."""
        return bool(self.curve) and self.curve[-1]["step"] >= step

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"curve": self.curve, "score": self.score, "step": self.step, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.curve, self.score = list(state_dict["curve"]), state_dict["score"]
        self.step, self.weights = state_dict["step"], state_dict["weights"]


class Validator:
    """Measures a model on the validation images, and on as many training images to see how far it overfits.

    Without a threat model only unperturbed accuracy is measured. The attack is PGD-10 with steps of epsilon/4, the same
    starting points at every step, so that curves do not move by chance.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Split,
        validation: Split,
        threat: Threat | None,
        streams: Streams,
        device: str,
        *,
        fast: bool = False,
        stop: Stop = NEVER,
    ) -> None:
        """``fast`` reads a folded copy of the model; ``stop`` is looked at before every forward pass."""
        self.parts = {"train": train.first(len(validation)), "validation": validation}
        self.threat, self.streams, self.device, self.stop = threat, streams, device, stop
        example = validation.first(2).images.to(device) if fast and has_batchnorm(model) else None
        self.reader = Reader(model, before=stop.check, example=example)

    def measure(self, step: int) -> dict[str, float]:
        """Accuracies of the model (in eval mode) after ``step`` steps; with a threat model also the robust-overfitting gap.

        Randomness: ``train/validate`` by batch.
        """
        row: dict[str, float] = {"step": step}
        for name, split in self.parts.items():
            clean, robust = self.count_correct(split)
            row[f"{name}_accuracy"] = clean / len(split)
            if robust is not None:
                row[f"{name}_pgd_accuracy"] = robust / len(split)
        if self.threat is not None:
            row["robust_gap"] = row["train_pgd_accuracy"] - row["validation_pgd_accuracy"]
        return {**row, "time_s": time.time()}

    def count_correct(self, split: Split) -> tuple[int, int | None]:
        """How many images are classified correctly, and how many still are after the attack.

        Several processes take the batches in turn; all get the counts of all. Raises ``InterruptedError`` in all when one
        was asked to stop.
        """
        processes = self.stop.processes
        clean, robust = 0, 0
        self.reader.refresh()
        with self.stop.agreed(), eval_mode(self.reader):
            for start in range(processes.rank * BATCH_SIZE, len(split), processes.count * BATCH_SIZE):
                part = Split(split.stored[start : start + BATCH_SIZE], split.labels[start : start + BATCH_SIZE])
                images, targets = part.images.to(self.device), part.targets.to(self.device)
                clean += _count(self.reader, images, targets)
                if self.threat is not None:
                    robust += _count(self.reader, self._attack(images, targets, start), targets)
        clean, robust = processes.total(clean, robust)
        return clean, robust if self.threat is not None else None

    def _attack(self, images: Tensor, targets: Tensor, start: int) -> Tensor:
        assert self.threat is not None
        return attack_pgd(
            self.reader,
            images,
            lambda logits: F.cross_entropy(logits, targets, reduction="sum"),
            self.threat,
            steps=PGD_STEPS,
            relative_step=RELATIVE_STEP,
            generator=self.streams.torch("train/validate", self.device, first=start),
        )


def score_of(row: dict[str, float]) -> float:
    """What weights are selected by: robust accuracy on validation images, or accuracy where there is no threat model."""
    return row.get("validation_pgd_accuracy", row["validation_accuracy"])


@torch.inference_mode()
def _count(model: nn.Module, images: Tensor, targets: Tensor) -> int:
    return int((model(images).argmax(1) == targets).sum())
