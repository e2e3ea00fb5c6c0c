"""Adversarial images that were found for one classifier, shown to another: a bound on its robustness in seconds."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from proxyrob.device import eval_mode
from proxyrob.evaluate.adversarial import ADVERSARIAL, check_inside, read_adversarial, read_adversarial_header
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import load_model
from proxyrob.source import read_rows, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.threat import Norm, Threat
from proxyrob.types import OnProgress, no_progress

BATCH_SIZE = 250

Classify = Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b k"]]
"""Images in [0,1] to logits, both on the CPU or both on one device: a model, or an ONNX session behind a function."""


class ReplayReport(Report):
    """How a classifier does on adversarial images that were found for another one, or for it at another time.

    ``fooled`` is the share of them that it misclassifies, ``fooled_by`` how many of each attack. ``upper_bound`` is the share
    of all images that it classifies correctly, unperturbed as well as with the stored perturbation where there is one: its
    robust accuracy is no higher.
    """

    clean: Measured
    fooled: Measured
    fooled_by: dict[str, int]
    upper_bound: Measured


def replay_adversarial(
    path: Path,
    classify: Classify,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    *,
    rows: Int64[np.ndarray, " n"] | None = None,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = no_progress,
) -> ReplayReport:
    """Show the stored adversarial images of ``images`` to any classifier; nothing is attacked anew.

    ``rows`` are those of the images in the whole split, ascending, where they are some of it.

    Every stored image is measured again first. Raises ``ValueError`` when they are of other images than these, and
    ``DataIntegrityError`` when one is outside its threat model.
    """
    header = read_adversarial_header(path)
    threat = Threat(cast(Norm, header.norm), Fraction(header.epsilon))
    standing = _classes(classify, images, batch_size, device) == labels
    clean = int(standing.sum())
    shown, fooled_by = 0, Counter[str]()
    known = np.arange(len(labels)) if rows is None else rows
    for part in read_adversarial(path):
        places = np.searchsorted(known, part.indices).clip(max=len(known) - 1)
        chosen = torch.from_numpy(places)
        if not np.array_equal(known[places], part.indices) or not np.array_equal(labels[chosen].numpy(), part.labels):
            raise ValueError(f"{path} holds adversarial images of another data set than these {len(labels)} images")
        check_inside(part.images, images[chosen], threat, part.attack)
        fooled = _classes(classify, part.images, batch_size, device) != labels[chosen]
        standing[chosen[fooled]] = False
        fooled_by[part.attack] += int(fooled.sum())
        shown += len(part)
        on_progress(min(shown, len(labels)), len(labels))
    on_progress(len(labels), len(labels))
    if shown == 0:
        raise ValueError(f"{path} holds no adversarial image: nothing was broken, and there is nothing to show")
    return ReplayReport(
        clean=measure_share(clean, len(labels)),
        fooled=measure_share(fooled_by.total(), shown),
        fooled_by=dict(sorted(fooled_by.items())),
        upper_bound=measure_share(int(standing.sum()), len(labels)),
    )


def replay_classifier(
    *,
    source: Stage,
    evaluation: Stage,
    model: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> ReplayReport:
    """Show the adversarial images of an evaluation to the classifier that ``model`` ended with.

    Raises ``ValueError`` when the evaluation is of other images than the test split of ``source``.
    """
    path = evaluation.verified(ADVERSARIAL)
    theirs, ours = read_adversarial_header(path).data_sha256, source_report(source).content_sha256
    if theirs != ours:
        raise ValueError(
            f"the evaluation is of other images (data sha256 {theirs[:12]}) than these ({ours[:12]}); replay on the same data"
        )
    split = read_split(source, "test")
    classifier = load_model(model, device)
    with eval_mode(classifier):
        return replay_adversarial(
            path,
            classifier,
            split.images,
            split.targets,
            rows=read_rows(source),
            device=device,
            on_progress=on_progress,
        )


@torch.inference_mode()
def _classes(
    classify: Classify, images: Float[Tensor, "n c h w"], batch_size: int, device: torch.device | str
) -> Int64[Tensor, " n"]:
    return torch.cat([classify(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)])
