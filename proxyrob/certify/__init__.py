"""Certificates by randomized smoothing."""

from proxyrob.certify.bounds import certified_radius, lower_bound
from proxyrob.certify.smoothing import (
    CertificateHeader,
    CertificationReport,
    certify_classifier,
    certify_image,
    count_votes,
    read_certificates,
    to_smoothing_tsv,
)

__all__ = [
    "CertificateHeader",
    "CertificationReport",
    "certified_radius",
    "certify_classifier",
    "certify_image",
    "count_votes",
    "lower_bound",
    "read_certificates",
    "to_smoothing_tsv",
]
