"""Certificates by randomized smoothing."""

from proxyrob.certify.attack import (
    SmoothAttackHeader,
    SmoothAttackReport,
    attack_smoothed_classifier,
    predict,
    read_attacks,
)
from proxyrob.certify.bounds import certified_radius, lower_bound
from proxyrob.certify.certificates import (
    CertificateHeader,
    CertificationReport,
    certified_rows,
    read_certificates,
    to_smoothing_tsv,
)
from proxyrob.certify.sequential import SequentialDesign, certify_sequentially, design_looks
from proxyrob.certify.smoothing import certify_classifier, certify_image
from proxyrob.certify.votes import count_votes, count_votes_of_several

__all__ = [
    "CertificateHeader",
    "CertificationReport",
    "SequentialDesign",
    "SmoothAttackHeader",
    "SmoothAttackReport",
    "attack_smoothed_classifier",
    "certified_radius",
    "certified_rows",
    "certify_classifier",
    "certify_image",
    "certify_sequentially",
    "count_votes",
    "count_votes_of_several",
    "design_looks",
    "lower_bound",
    "predict",
    "read_attacks",
    "read_certificates",
    "to_smoothing_tsv",
]
