"""Real images, verified and split; images in files of any layout."""

from proxyrob.source.digits import prepare_digits
from proxyrob.source.fingerprint import fingerprint, pin_source
from proxyrob.source.formats import ImageFile, open_images
from proxyrob.source.prepare import prepare_source
from proxyrob.source.splits import SourceReport, Split, read_split, source_report
from proxyrob.source.subset import ImageSubset, fingerprint_test, read_rows, read_test_images, take_test_images

__all__ = [
    "ImageFile",
    "ImageSubset",
    "SourceReport",
    "Split",
    "fingerprint",
    "fingerprint_test",
    "open_images",
    "pin_source",
    "prepare_digits",
    "prepare_source",
    "read_rows",
    "read_split",
    "read_test_images",
    "source_report",
    "take_test_images",
]
