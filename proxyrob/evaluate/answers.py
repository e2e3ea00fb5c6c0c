"""Checks of what a network answers: logits, one set for each image, whatever else is in the batch."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proxyrob.config.evaluate import CheckName
from proxyrob.evaluate.checks import SanityCheck, judge

LOGIT_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, between batches of another size or order: float32 rounds sums
otherwise there, and no more. AutoAttack's own check for randomised defences allows as much."""

NUM_COMPARED = 16
"""Images read one by one, and beside strangers."""

SUM_TOLERANCE = 1e-4
"""By how much float32 may carry the sum of a softmax off 1."""


def check_answers(
    model: nn.Module, images: Float[Tensor, "n c h w"], *, num_classes: int, generator: torch.Generator
) -> list[SanityCheck]:
    """One logit for each class, and the same logits for the same image: again, alone, at another place in the batch, and
    beside black, white and noisy images.

    Randomness: the order, then the noise, from ``generator``.
    """
    with torch.no_grad():
        logits = model(images)
        return [
            _check_classes(logits, num_classes),
            _check_logits(logits),
            *_check_batches(model, images, logits, generator),
        ]


def check_buffers(model: nn.Module, before: dict[str, Tensor]) -> SanityCheck:
    """No running statistic is another than it was ``before``."""
    moved = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    finding = f"{len(moved)} of {len(before)} buffers changed" + (f": {', '.join(moved[:3])}" if moved else "")
    return judge("running-statistics", not moved, finding, "none changes while the model is read and attacked")


def _check_classes(logits: Float[Tensor, "n k"], num_classes: int) -> SanityCheck:
    found = logits.shape[1]
    return judge("class-count", found == num_classes, f"{found} outputs for {num_classes} classes", "one for each class")


def _check_logits(logits: Float[Tensor, "n k"]) -> SanityCheck:
    sums, least = logits.sum(1), float(logits.min())
    probabilities = bool(((sums - 1.0).abs() <= SUM_TOLERANCE).all()) and least >= 0.0
    return judge(
        "logits",
        not probabilities,
        f"outputs from {least:.3g} to {float(logits.max()):.3g}, sums from {float(sums.min()):.3g} to {float(sums.max()):.3g}",
        f"no probabilities (all at least 0, sums 1 ± {SUM_TOLERANCE:g}): their gradients vanish where they are near 0 or 1",
    )


def _check_batches(
    model: nn.Module, images: Float[Tensor, "n c h w"], logits: Float[Tensor, "n k"], generator: torch.Generator
) -> list[SanityCheck]:
    few = images[:NUM_COMPARED]
    order = torch.randperm(len(images), generator=generator, device=images.device)
    noise = torch.rand(few.shape, generator=generator, device=images.device)
    padded = torch.cat([few, torch.zeros_like(few), torch.ones_like(few), noise])
    found: dict[CheckName, tuple[Tensor, Tensor]] = {
        "deterministic": (model(images), logits),
        "batch-of-one": (torch.cat([model(image[None]) for image in few]), logits[: len(few)]),
        "batch-order": (model(images[order]), logits[order]),
        "batch-padding": (model(padded)[: len(few)], logits[: len(few)]),
    }
    size = float(logits.abs().amax().clamp_min(1e-12))
    checks = []
    for name, (other, same) in found.items():
        difference = float((other - same).abs().amax()) / size
        checks.append(
            judge(
                name,
                difference <= LOGIT_TOLERANCE,
                f"logits of the same image differ by {difference:.1e} of the largest",
                f"at most {LOGIT_TOLERANCE:g}",
            )
        )
    return checks
