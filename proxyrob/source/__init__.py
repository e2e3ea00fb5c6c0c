"""Real images, verified and split; images in files of any layout."""

from proxyrob.source.digits import prepare_digits
from proxyrob.source.fingerprint import fingerprint, pin_source
from proxyrob.source.formats import ImageFile, open_images
from proxyrob.source.prepare import prepare_source
from proxyrob.source.splits import SourceReport, Split, read_split, source_report

__all__ = [
    "ImageFile",
    "SourceReport",
    "Split",
    "fingerprint",
    "open_images",
    "pin_source",
    "prepare_digits",
    "prepare_source",
    "read_split",
    "source_report",
]
