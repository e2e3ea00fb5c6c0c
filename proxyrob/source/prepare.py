"""Real images, whatever their source: verified, split and written."""

from pathlib import Path

from proxyrob.config.source import CifarSource, DigitsSource, SourceConfig
from proxyrob.source.cifar import prepare_cifar
from proxyrob.source.digits import prepare_digits
from proxyrob.source.given import prepare_given
from proxyrob.source.splits import SourceReport
from proxyrob.storage import Stage
from proxyrob.types import OnProgress, no_progress


def prepare_source(
    config: SourceConfig, *, seed: int, stage: Stage, downloads: Path, on_progress: OnProgress = no_progress
) -> SourceReport:
    """Verify the source's images, split them and write the splits; what is downloaded lies below ``downloads``.

    Only the split of the digits depends on ``seed``. Raises what ``prepare_digits``, ``prepare_cifar`` and
    ``prepare_given`` raise.
    """
    match config:
        case DigitsSource():
            return prepare_digits(config, seed=seed, stage=stage, on_progress=on_progress)
        case CifarSource():
            return prepare_cifar(config, stage=stage, downloads=downloads, on_progress=on_progress)
        case _:
            return prepare_given(config, stage=stage, on_progress=on_progress)
