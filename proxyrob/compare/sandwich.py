"""Certified, true and attacked accuracy of one smoothed classifier: certified ≤ true ≤ attacked, image for image."""

import numpy as np
import pandas as pd
from scipy import stats

from proxyrob.certify import CertificateHeader, SmoothAttackHeader, certified_rows, lower_bound
from proxyrob.compare.tables import are_of_same_images
from proxyrob.intervals import Measured, measure_share
from proxyrob.storage import Report
from proxyrob.threat import parse_threat

Certificates = tuple[pd.DataFrame, CertificateHeader]
SmoothAttacks = tuple[pd.DataFrame, SmoothAttackHeader]


class Contradiction(Report):
    """An image whose certificate and whose attack cannot both be right.

    The certificate promises that the class keeps the probability ``promised`` or more at ``distance_l2``; the votes there
    show that it has ``found`` at most.
    """

    index: int
    radius_l2: float
    distance_l2: float
    promised: float
    found: float


class Sandwich(Report):
    """The bounds on the accuracy under a threat model, and the images at which they contradict each other.

    Certificates and judgements are each wrong with probability alpha: of a correct program ``expected_contradictions`` at most
    are expected, and far fewer where the attack is not the worst there is. More are an alarm: then the noise, the radii or
    the network are not what they are taken for.
    """

    threat: str
    certified: Measured
    attacked: Measured
    contradictions: tuple[Contradiction, ...]
    expected_contradictions: float


def check_sandwich(certificates: Certificates, attacks: SmoothAttacks) -> Sandwich:
    """Join the certificates of a smoothed classifier with an attack on the same one.

    Where x is certified up to R, the class has the probability Φ((R − ‖δ‖)/σ) or more at x + δ, at every distance (Cohen et
    al. 2019, the proof of theorem 1). An upper confidence bound (Clopper–Pearson) below that is a contradiction, long before
    the class changes; an image that is broken within R is one in any case.

    Raises ``ValueError`` when the two are of different classifiers (model, precision, sigma) or of different images. Attacks
    on the network itself are none on the smoothed classifier, and are not taken.
    """
    (table, header), (attacked, other) = certificates, attacks
    for name in ("model", "precision", "sigma", "split", "data_sha256"):
        ours, theirs = getattr(header, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(
                f"certificates and attack cannot be joined: {name} is {ours} and {theirs}; attack what was certified"
            )
    if not are_of_same_images(table, attacked):
        raise ValueError("certificates and attack cannot be joined: they are of different images")
    threat = parse_threat(f"{other.norm}:{other.epsilon}")
    certified = certified_rows(table, threat.enclosing_l2_radius(header.num_values))
    broken = (attacked.prediction != attacked.label).fillna(False).to_numpy(dtype=bool)
    radius, distance = table.radius_l2.to_numpy(), attacked.distance_l2.to_numpy()
    promised = stats.norm.cdf((radius - distance) / header.sigma)
    found = np.array(
        [1.0 - lower_bound(n - count, n, other.alpha) for count, n in zip(attacked["count"], attacked.n, strict=True)]
    )
    return Sandwich(
        threat=str(threat),
        certified=measure_share(int(certified.sum()), len(table)),
        attacked=measure_share(int((~broken).sum()), len(table)),
        contradictions=tuple(
            Contradiction(
                index=int(table["index"].iloc[row]),
                radius_l2=float(radius[row]),
                distance_l2=float(distance[row]),
                promised=float(promised[row]),
                found=float(found[row]),
            )
            for row in np.flatnonzero(certified_rows(table, 0.0) & (found < promised))
        ),
        expected_contradictions=(header.alpha + other.alpha) * len(table),
    )
