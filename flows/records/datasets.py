"""Images as MLflow's data sets."""

import json
from typing import TypeVar

from mlflow.entities import Dataset, DatasetInput, InputTag

from proxyrob.proxy import SamplesReport
from proxyrob.source import SourceReport
from proxyrob.storage import Report, Stage

R = TypeVar("R", bound=Report)


def report_of(stage: Stage, kind: type[R]) -> R:
    """The report of a stage that has to be finished."""
    report = stage.finished(kind)
    assert report is not None, f"stage {stage.name} is recorded before it has finished"
    return report


def describe_dataset(stage: Stage, context: str, uri: str | None = None) -> DatasetInput:
    """A stage's images as an MLflow data set, identified by the stage's digest; ``uri`` where they are not in its folder."""
    if stage.name == "source":
        real = report_of(stage, SourceReport)
        count = real.num_test if context == "evaluation" else real.num_train
        name, profile = f"{'test' if context == 'evaluation' else 'training'} images", {"num_rows": count}
    else:
        name, profile = "synthetic images", {"num_rows": report_of(stage, SamplesReport).num_images}
    entity = Dataset(
        name=name,
        digest=stage.digest[:16],
        source_type="s3" if uri and uri.startswith("s3://") else "local",
        source=json.dumps({"uri": uri or stage.folder.as_uri()}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset=entity, tags=[InputTag("mlflow.data.context", context)])
