"""Certification by randomized smoothing (Cohen et al. 2019, «Certified Adversarial Robustness via Randomized Smoothing»)."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from proxyrob.certify.bounds import certified_radius, lower_bound
from proxyrob.config.evaluate import CertifyConfig
from proxyrob.intervals import Measured, measure_mean, measure_share
from proxyrob.models import load_classifier
from proxyrob.rng import Streams
from proxyrob.source import read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import read_header, run_units, write_table
from proxyrob.types import OnProgress, no_progress

CERTIFICATES = "certificates.parquet"
UNIT_SIZE = 10


class CertificateHeader(Report):
    """Under which conditions certificates were issued."""

    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int
    split: str
    model: str
    data_sha256: str


class CertificationReport(Report):
    """Certified accuracy at each radius; an image counts when its class is right and its radius at least that."""

    certified: dict[str, Measured]
    average_certified_radius: Measured
    abstained: Measured
    expected_false_certificates: float


def certify_classifier(
    config: CertifyConfig,
    *,
    sigma: float,
    source: Stage,
    model: Stage,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> CertificationReport:
    """Certify the first ``config.num_images`` test images and write ``certificates.parquet``.

    Goes on after a kill from the last finished ten images.

    Randomness: ``certify/select`` and ``certify/estimate`` by image.
    """
    if (report := stage.finished(CertificationReport)) is not None:
        return report
    started = time.monotonic()
    streams = Streams(seed)
    split = read_split(source, "test").first(config.num_images)
    classifier = load_classifier(model, device)
    images = split.images.to(device)
    units = {
        f"images-{k:05d}": range(start, min(start + UNIT_SIZE, len(split)))
        for k, start in enumerate(range(0, len(split), UNIT_SIZE))
    }

    def certify_some(name: str) -> pd.DataFrame:
        rows = []
        for index in units[name]:
            before = time.monotonic()
            row = certify_image(
                classifier,
                images[index],
                sigma=sigma,
                n0=config.n0,
                n=config.n,
                alpha=config.alpha,
                batch_size=config.batch_size,
                select=streams.torch("certify/select", device, image=index),
                estimate=streams.torch("certify/estimate", device, image=index),
            )
            rows.append({"index": index, "label": int(split.labels[index]), **row, "elapsed_s": time.monotonic() - before})
        table = pd.DataFrame(rows)
        return table.astype({"prediction": "Int64"})

    def tell(done: int) -> None:
        on_progress(min(done * UNIT_SIZE, len(split)), len(split))

    table = run_units(stage.scratch / "certificates", list(units), certify_some, tell)
    header = CertificateHeader(
        sigma=sigma,
        n0=config.n0,
        n=config.n,
        alpha=config.alpha,
        seed=seed,
        split="test",
        model=model.digest,
        data_sha256=source_report(source).content_sha256,
    )
    write_table(stage.folder / CERTIFICATES, table, header.model_dump(mode="json"))
    stage.finish(report := summarise(table, config.radii, config.alpha), [CERTIFICATES], started)
    stage.clear()
    return report


def certify_image(
    model: nn.Module,
    image: Float[Tensor, "c h w"],
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    batch_size: int,
    select: torch.Generator,
    estimate: torch.Generator,
) -> dict[str, object]:
    """Algorithm CERTIFY: the class from ``n0`` samples, its probability from ``n`` fresh ones.

    Returns ``prediction`` (``None`` when abstaining), ``count`` of the chosen class among ``n``, ``n0``, ``n``,
    ``alpha``, ``sigma`` and ``radius_l2`` (0 when abstaining). The noise is not clipped to [0,1].

    Randomness: ``select`` for the first sample, ``estimate`` for the second; they must be different streams.
    """
    chosen = int(count_votes(model, image, sigma, n0, batch_size, select).argmax())
    count = int(count_votes(model, image, sigma, n, batch_size, estimate)[chosen])
    radius = certified_radius(lower_bound(count, n, alpha), sigma)
    return {
        "prediction": None if radius is None else chosen,
        "count": count,
        "n0": n0,
        "n": n,
        "alpha": alpha,
        "sigma": sigma,
        "radius_l2": 0.0 if radius is None else radius,
    }


@torch.inference_mode()
def count_votes(
    model: nn.Module, image: Float[Tensor, "c h w"], sigma: float, n: int, batch_size: int, generator: torch.Generator
) -> Int64[Tensor, " k"]:
    """How often each class is predicted for ``n`` noisy copies of an image.

    Randomness: n · c · h · w normal deviates from ``generator``; batches of another size draw other deviates.
    """
    votes: Int64[Tensor, " k"] | None = None
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        noise = torch.randn((size, *image.shape), generator=generator, device=image.device)
        logits = model(noise.mul_(sigma).add_(image))
        found = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
        votes = found if votes is None else votes + found
    if votes is None:
        raise ValueError(f"expected at least one sample, got n={n}")
    return votes


def summarise(table: pd.DataFrame, radii: tuple[float, ...], alpha: float) -> CertificationReport:
    """Certified accuracies of a table. Abstentions count as not certified; a wrong class has radius 0 in the average."""
    right = (table.prediction == table.label).fillna(False).to_numpy(dtype=bool)
    radius = np.where(right, table.radius_l2.to_numpy(), 0.0)
    return CertificationReport(
        certified={f"{r:g}": measure_share(int((right & (radius >= r)).sum()), len(table)) for r in radii},
        average_certified_radius=measure_mean(radius),
        abstained=measure_share(int(table.prediction.isna().sum()), len(table)),
        expected_false_certificates=alpha * len(table),
    )


def read_certificates(stage: Stage) -> tuple[pd.DataFrame, CertificateHeader]:
    """A finished table of certificates and the conditions it was made under, hash checked."""
    path: Path = stage.verified(CERTIFICATES)
    return pd.read_parquet(path), CertificateHeader.model_validate(read_header(path))


def to_smoothing_tsv(table: pd.DataFrame) -> str:
    """The six columns that locuslab/smoothing's tools read: idx, label, predict, radius, correct, time.

    Abstention is -1 there. A radius is rounded down, never up.
    """
    lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
    for row in table.to_dict("records"):
        label, predicted = row["label"], -1 if pd.isna(row["prediction"]) else int(row["prediction"])
        radius = np.floor(row["radius_l2"] * 1000.0) / 1000.0
        lines.append(f"{row['index']}\t{label}\t{predicted}\t{radius:.3f}\t{int(predicted == label)}\t{row['elapsed_s']:.6f}")
    return "\n".join(lines) + "\n"
