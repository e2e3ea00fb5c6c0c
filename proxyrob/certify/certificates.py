"""The table of certificates: one row per image. Every certified accuracy is derived from it, none is typed."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from proxyrob.config.certify import CertifyConfig
from proxyrob.intervals import Measured, measure_mean, measure_share
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import read_frame, read_header

CERTIFICATES = "certificates.parquet"


class CertificateHeader(Report):
    """Under which conditions certificates were issued.

    ``grid`` are the radii for which the answer was sought; ``None`` where it was the largest radius. ``n`` is the number of
    samples of an image, at most where the method is sequential. ``num_values`` are the values of an image, which relate L∞
    to L2.
    """

    sigma: float
    n0: int
    n: int
    alpha: float
    method: dict[str, Any]
    grid: tuple[float, ...] | None
    precision: str
    num_values: int
    seed: int
    split: str
    model: str
    data_sha256: str
    subset: str = "all"

    @property
    def conditions(self) -> str:
        """For people: ``σ = 0.25, n = 10,000``."""
        precision = "" if self.precision == "float32" else f", {self.precision}"
        return f"σ = {self.sigma:g}, n {'=' if self.grid is None else '≤'} {self.n:,}{precision}"


class CertificationReport(Report):
    """Certified accuracy at each L2 radius and L∞ threshold; an image counts when its class is right and certified that far.

    Abstained from are the images of which not even the smallest radius is certified. ``samples_per_image`` is a mean, the
    samples that choose the class among them. Of all images at most ``expected_false_certificates`` are expected to have a
    certificate that does not hold: alpha for each.
    """

    certified: dict[str, Measured]
    certified_linf: dict[str, Measured]
    average_certified_radius: Measured
    abstained: Measured
    samples_per_image: float
    expected_false_certificates: float


def summarise(table: pd.DataFrame, config: CertifyConfig, num_values: int) -> CertificationReport:
    """The figures of a table. Abstentions count as not certified; a wrong class has radius 0 in the average."""

    def share(radius: float) -> Measured:
        return measure_share(int(certified_rows(table, radius).sum()), len(table))

    right = (table.prediction == table.label).fillna(False).to_numpy(dtype=bool)
    return CertificationReport(
        certified={f"{radius:g}": share(radius) for radius in config.radii},
        certified_linf={threshold: share(radius) for threshold, radius in config.linf_radii(num_values).items()},
        average_certified_radius=measure_mean(np.where(right, table.radius_l2.to_numpy(), 0.0)),
        abstained=measure_share(int(table.prediction.isna().sum()), len(table)),
        samples_per_image=float((table.n0 + table.n).mean()),
        expected_false_certificates=config.alpha * len(table),
    )


def certified_rows(table: pd.DataFrame, radius: float) -> Bool[np.ndarray, " n"]:
    """Which images are classified correctly and certified at least up to an L2 radius."""
    right = (table.prediction == table.label).fillna(False).to_numpy(dtype=bool)
    return right & (table.radius_l2 >= radius).to_numpy()


def read_certificates(stage: Stage) -> tuple[pd.DataFrame, CertificateHeader]:
    """A finished table of certificates and the conditions it was made under, hash checked."""
    path: Path = stage.verified(CERTIFICATES)
    return read_frame(path, stage.remedy), read_header(path, CertificateHeader, stage.remedy)


def to_smoothing_tsv(table: pd.DataFrame) -> str:
    """The six columns that locuslab/smoothing's tools read: idx, label, predict, radius, correct, time.

    Abstention is -1 there, with radius 0. A radius is written with all its digits: three of them, as there, would round up
    certificates or lose them.
    """
    lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
    for row in table.to_dict("records"):
        label, predicted = row["label"], -1 if pd.isna(row["prediction"]) else int(row["prediction"])
        elapsed = timedelta(seconds=row["elapsed_s"])
        lines.append(f"{row['index']}\t{label}\t{predicted}\t{row['radius_l2']}\t{int(predicted == label)}\t{elapsed}")
    return "\n".join(lines) + "\n"
