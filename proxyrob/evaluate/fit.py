"""Does a model fit the images it is to be measured on? Asked before any attack, of somebody else's model."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from proxyrob.evaluate.answers import SUM_TOLERANCE
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import channel_statistics, load_model
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.types import OnProgress, no_progress

NUM_IMAGES = 64
FEWEST_IMAGES = 32
"""Of fewer images a good model may have as many right as a guess, by chance."""

SIGNIFICANCE = 0.01
CLEAR_SHARE = 0.7
"""Share of the images that are right after a change of the input, or of the classes, from which on the change is named."""


class Fit(Report):
    """The clean accuracy on the first images."""

    clean: Measured


def require_fit(
    reference: str, *, model: Stage, source: Stage, device: str = "cpu", on_progress: OnProgress = no_progress
) -> Fit:
    """Show a model the first 64 test images, in [0,1], and look at what it answers.

    ``reference`` is what errors call it. Raises ``ValueError`` when it does not take such images, gives no logits, or not one
    for each class, or NaN, or probabilities; and when of 32 images or more it has no more right than a guess: then it says
    whether they would be right if they were normalised, or the classes in another order.
    """
    report, split = source_report(source), read_split(source, "test").first(NUM_IMAGES)
    network, images, labels = load_model(model, device), split.images.to(device), split.targets
    on_progress(0, 1)
    logits = read_logits(network, images, reference, num_classes=len(report.class_names))
    right = int((logits.argmax(1) == labels).sum())
    guess = max(1 / len(report.class_names), float(np.bincount(split.labels).max()) / len(split))
    if len(split) >= FEWEST_IMAGES and stats.binom.sf(right - 1, len(split), guess) > SIGNIFICANCE:
        raise ValueError(
            f"{reference} classifies {right} of {len(split)} unperturbed images correctly, no more than a guess; it gets "
            f"images in [0,1], not normalised, and classes in this order: {_shortened(report.class_names)}"
            f"{_explain(network, split, images, logits)}"
        )
    on_progress(1, 1)
    return Fit(clean=measure_share(right, len(split)))


def read_logits(
    model: nn.Module, images: Float[Tensor, "n c h w"], reference: str, *, num_classes: int
) -> Float[Tensor, "n k"]:
    """What a model answers, on the CPU. Raises ``ValueError`` unless that is one finite logit for each class."""
    shape = "×".join(str(side) for side in images.shape[1:])
    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:  # whatever somebody's model raises, the cause and the shape are what a person needs
        raise ValueError(
            f"{reference} does not take images of {shape} (channels×height×width, float32 in [0,1]), as these are: {error}"
        ) from error
    expected = (len(images), num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{reference} returns {found} for {len(images)} images, expected {expected}: one logit for each of the "
            f"{num_classes} classes of the images"
        )
    logits = logits.detach().float().cpu()
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{reference} returns NaN or infinite values for images in [0,1]; no attack can be trusted on it")
    if float(logits.min()) >= 0.0 and bool(((logits.sum(1) - 1.0).abs() <= SUM_TOLERANCE).all()):
        raise ValueError(
            f"{reference} returns probabilities, whose gradients vanish; return what the softmax is given, or their logarithm"
        )
    return logits


def _explain(model: nn.Module, split: Split, images: Float[Tensor, "n c h w"], logits: Float[Tensor, "n k"]) -> str:
    """What would make most images right, if anything of the usual does."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in channel_statistics(split.stored))
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "images were normalised by mean and standard deviation (make that the model's first layer)": lambda x: (x - mean) / std,
        "images were in [-1,1] (make 2x - 1 the model's first layer)": lambda x: 2 * x - 1,
        "pixels had 255 levels (make a factor of 255 the model's first layer)": lambda x: 255 * x,
        "the channels came in reversed order (reverse them in the model)": lambda x: x.flip(1),
    }
    for change, apply in changes.items():
        with torch.no_grad():
            right = int((model(apply(images)).argmax(1).cpu() == split.targets).sum())
        if right >= CLEAR_SHARE * len(split):
            return f"; {right} would be right if {change}"
    matched = _matched(logits.argmax(1).numpy(), split.labels, logits.shape[1])
    if matched >= CLEAR_SHARE * len(split):
        return f"; {matched} would be right if the classes came in another order"
    return "; is normalisation part of the model, and are its classes in that order?"


def _matched(predictions: Int64[np.ndarray, " n"], labels: Int64[np.ndarray, " n"], num_classes: int) -> int:
    """How many images are right under the best renaming of the classes."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (predictions, labels), 1)
    return int(counts[linear_sum_assignment(-counts)].sum())


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:10])}, … ({len(names)})"
