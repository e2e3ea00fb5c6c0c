"""Checks against gradient masking and other ways in which a robust accuracy is wrong. A failed one blocks promotion."""

import time
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.evaluate.autoattack import STANDARD_ATTACKS
from proxyrob.evaluate.verdicts import read_verdicts, robust_rows
from proxyrob.models import load_classifier
from proxyrob.rng import Streams
from proxyrob.source import read_split
from proxyrob.storage import Report, Stage
from proxyrob.threat import LARGEST_EPSILON, Norm, Threat
from proxyrob.types import OnProgress, no_progress

NUM_IMAGES = 128
LOGIT_TOLERANCE = 1e-4
"""Largest relative difference of logits between batches of another size or order: float32 rounding, and no more."""

CURVE_STEPS = 20
SHARES_OF_FULL = (0.0, 0.125, 0.25, 0.5, 1.0)


class SanityCheck(Report):
    """One check: what was found, and whether it may be promoted so."""

    name: str
    passed: bool
    finding: str


class SanityReport(Report):
    """All checks of one model."""

    passed: bool
    checks: tuple[SanityCheck, ...]


def check_sanity(
    *,
    source: Stage,
    model: Stage,
    evaluation: Stage,
    norm: Norm,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> SanityReport:
    """Run every check on the first 128 test images and on the verdict table."""
    if (report := stage.finished(SanityReport)) is not None:
        return report
    started = time.monotonic()
    split = read_split(source, "test").first(NUM_IMAGES)
    classifier = load_classifier(model, device)
    images, labels = split.images.to(device), split.targets.to(device)
    before = _buffers(classifier)
    checks = [_check_inputs(split.images)]
    checks += inspect_model(
        classifier, images, labels, norm=norm, generator=Streams(seed).torch("evaluate/sanity", device), on_progress=on_progress
    )
    moved = [name for name, value in _buffers(classifier).items() if not torch.equal(value, before[name])]
    checks.append(
        SanityCheck(
            name="running statistics stay", passed=not moved, finding=f"changed: {', '.join(moved)}" if moved else "unchanged"
        )
    )
    table, header = read_verdicts(evaluation)
    (pgd_name,) = [name for name in header.attacks if name.startswith("pgd")]
    ensemble, weaker = (int(robust_rows(table, attacks).sum()) for attacks in (STANDARD_ATTACKS, (pgd_name,)))
    checks.append(
        SanityCheck(
            name="AutoAttack is not weaker than PGD",
            passed=ensemble <= weaker,
            finding=f"{ensemble} of {len(table)} images withstand AutoAttack, {weaker} withstand {pgd_name}",
        )
    )
    black_box = int((table.broken_by == "square").sum())
    checks.append(
        SanityCheck(
            name="black box adds little to white box",
            passed=black_box <= max(2, 0.005 * len(table)),
            finding=f"Square alone broke {black_box} of {len(table)} images",
        )
    )
    report = SanityReport(passed=all(check.passed for check in checks), checks=tuple(checks))
    return stage.finish(report, [], started)


def inspect_model(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    *,
    norm: Norm,
    generator: torch.Generator,
    on_progress: OnProgress = no_progress,
) -> list[SanityCheck]:
    """The checks that need a model and some images; any torch model that gives logits will do.

    Randomness: attack starts and a permutation, from ``generator``.
    """
    with torch.inference_mode():
        logits = model(images)
        again = model(images)
        alone = torch.cat([model(image[None]) for image in images[:16]])
        order = torch.randperm(len(images), generator=generator, device=images.device)
        permuted = model(images[order])
    size = float(logits.abs().amax().clamp_min(1e-12))
    differences = {
        "the same twice": float((again - logits).abs().amax()) / size,
        "the same alone and in a batch": float((alone - logits[: len(alone)]).abs().amax()) / size,
        "the same in another order": float((permuted - logits[order]).abs().amax()) / size,
    }
    checks = [
        SanityCheck(
            name=f"logits are {name}", passed=value <= LOGIT_TOLERANCE, finding=f"largest relative difference {value:.1e}"
        )
        for name, value in differences.items()
    ]
    sums = logits.sum(1)
    probabilities = bool(((sums - 1).abs() < 1e-4).all()) and float(logits.min()) >= 0
    checks.append(
        SanityCheck(
            name="outputs are logits",
            passed=not probabilities,
            finding="the outputs are probabilities: attacks on them see vanishing gradients"
            if probabilities
            else "they are not probabilities",
        )
    )
    checks.append(_check_gradients(model, images, labels))
    checks.append(_check_curve(model, images, labels, norm, generator, on_progress))
    return checks


def _check_inputs(images: Float[Tensor, "n c h w"]) -> SanityCheck:
    off_grid = float((images * 255.0 - (images * 255.0).round()).abs().max())
    inside = float(images.min()) >= 0.0 and float(images.max()) <= 1.0
    return SanityCheck(
        name="inputs lie in [0,1] on the 8-bit grid",
        passed=inside and off_grid < 1e-3,
        finding=f"range [{float(images.min()):.3f}, {float(images.max()):.3f}], at most {off_grid:.1e} of a level off the grid",
    )


def _check_gradients(model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int64[Tensor, " n"]) -> SanityCheck:
    probe = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(probe), labels, reduction="sum"), probe)
    zero = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    return SanityCheck(
        name="gradients reach the image",
        passed=zero <= 0.01 * len(images),
        finding=f"{zero} of {len(images)} images have an all-zero gradient of the loss",
    )


def _check_curve(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    norm: Norm,
    generator: torch.Generator,
    on_progress: OnProgress,
) -> SanityCheck:
    """Accuracy under PGD falls with epsilon, to no more than chance at an epsilon that can erase an image."""
    largest = LARGEST_EPSILON[norm]
    correct = []
    for done, share in enumerate(SHARES_OF_FULL):
        attacked = images
        if share > 0:
            attacked = attack_pgd(
                model,
                images,
                lambda logits: F.cross_entropy(logits, labels, reduction="sum"),
                Threat(norm, largest * Fraction(share)),
                steps=CURVE_STEPS,
                relative_step=0.125,
                generator=generator,
            )
        with torch.inference_mode():
            correct.append(int((model(attacked).argmax(1) == labels).sum()))
        on_progress(done + 1, len(SHARES_OF_FULL))
    slack = max(1, round(0.01 * len(labels)))
    falling = all(later <= earlier + slack for earlier, later in pairwise(correct))
    chance = len(labels) * (1.0 / int(np.unique(labels.cpu().numpy()).size))
    return SanityCheck(
        name="accuracy falls to chance as epsilon grows",
        passed=falling and correct[-1] <= chance,
        finding=f"correct of {len(labels)} at growing epsilon: {', '.join(str(count) for count in correct)}",
    )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}
