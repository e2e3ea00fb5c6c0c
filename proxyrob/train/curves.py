"""The curves that a training leaves behind."""

from collections.abc import Mapping, Sequence

import pandas as pd

from proxyrob.storage import Stage
from proxyrob.storage.files import read_frame, write_table

HISTORY = "history.parquet"
CURVE = "curve.parquet"

Row = dict[str, float]


def read_history(stage: Stage) -> pd.DataFrame:
    """The curve of a finished training: step, loss, accuracy, learning_rate, time_s."""
    return read_frame(stage.verified(HISTORY), stage.remedy)


def read_curve(stage: Stage) -> pd.DataFrame:
    """What was measured while training ran, of the averaged weights (``Validator.measure``); empty if nothing was."""
    record = stage.record()
    if record is None or CURVE not in {entry.name for entry in record.files}:
        return pd.DataFrame({"step": [], "time_s": []})
    return read_frame(stage.verified(CURVE), stage.remedy)


def write_curves(stage: Stage, curves: Mapping[str, Sequence[Row]]) -> list[str]:
    """Write those that have points; their names."""
    written = {name: rows for name, rows in curves.items() if rows}
    for name, rows in written.items():
        write_table(stage.folder / name, pd.DataFrame(rows).astype({"step": "int64"}))
    return list(written)
