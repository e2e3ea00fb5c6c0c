"""Real images, verified and split."""

from proxyrob.source.digits import prepare_digits
from proxyrob.source.splits import SourceReport, Split, read_split, source_report

__all__ = ["SourceReport", "Split", "prepare_digits", "read_split", "source_report"]
