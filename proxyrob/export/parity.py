"""Proof that an exported model equals the torch model: classes and logits on clean, attacked and noisy images."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.source import Split
from proxyrob.storage import Report
from proxyrob.threat import Threat

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit: float32 rounding in another order, and no more."""

NOISE_SIGMA = 0.25
ATTACK_STEPS = 20


class ParityRow(Report):
    """One kind of images."""

    kind: str
    num_images: int
    different_classes: int
    largest_relative_difference: float


class ParityReport(Report):
    """The comparison on every kind of images."""

    passed: bool
    rows: tuple[ParityRow, ...]

    def describe(self) -> str:
        """One line for a person."""
        return "; ".join(
            f"{row.kind}: {row.different_classes} of {row.num_images} classes differ, logits by at most "
            f"{row.largest_relative_difference:.1e} of the largest"
            for row in self.rows
        )


def prove_parity(model: nn.Module, path: Path, split: Split, threat: Threat, generator: torch.Generator) -> ParityReport:
    """Compare ``model`` with the ONNX file at ``path`` on a split: as it is, attacked by PGD-20 through torch, and with
    Gaussian noise of standard deviation 0.25. A batch of one is part of each comparison.

    Passed when no class differs and no logit differs by more than rounding.

    Randomness: the attack's start, then the noise, from ``generator``.
    """
    images, labels = split.images, split.targets
    attacked = attack_pgd(
        model,
        images,
        lambda logits: F.cross_entropy(logits, labels, reduction="sum"),
        threat,
        steps=ATTACK_STEPS,
        relative_step=0.125,
        generator=generator,
    )
    noisy = images + NOISE_SIGMA * torch.randn(images.shape, generator=generator)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = tuple(
        _compare(model, session, kind, batch) for kind, batch in (("clean", images), ("attacked", attacked), ("noisy", noisy))
    )
    passed = all(row.different_classes == 0 and row.largest_relative_difference <= TOLERANCE for row in rows)
    return ParityReport(passed=passed, rows=rows)


def _compare(model: nn.Module, session: onnxruntime.InferenceSession, kind: str, images: Float[Tensor, "n c h w"]) -> ParityRow:
    with torch.inference_mode():
        expected = model(images).numpy()
    found = np.concatenate(
        [
            np.asarray(session.run(["logits"], {"images": part})[0])
            for part in (images[:1].numpy(), images[1:].numpy())
            if len(part)
        ]
    )
    return ParityRow(
        kind=kind,
        num_images=len(images),
        different_classes=int((expected.argmax(1) != found.argmax(1)).sum()),
        largest_relative_difference=float(np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-12)),
    )
