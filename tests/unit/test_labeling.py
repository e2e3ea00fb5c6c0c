"""Labels beside shards that are never rewritten."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from proxyrob.config import JitterProxy, SamplingConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.label import LabelReport, apply_rule, label_shards
from proxyrob.models import load_classifier
from proxyrob.proxy import sample_proxy
from proxyrob.shards import INDEX, read_manifest
from proxyrob.storage import DataPlace, Stage
from proxyrob.types import as_images
from tests.conftest import MakeStage
from tests.toys import Killer, StopHereError, damage, files_below, read_images, read_labels


def _table(samples: Stage, labels: Stage) -> pd.DataFrame:
    return read_labels(DataPlace.of(samples.folder), DataPlace.of(labels.folder))


@torch.inference_mode()
def _probabilities(labeler: Stage, samples: Stage) -> np.ndarray:
    return load_classifier(labeler)(as_images(read_images(DataPlace.of(samples.folder)))).softmax(dim=1).numpy()


def test_labels_are_the_rule_on_both_labelers_votes(
    samples: Stage, labels: Stage, toy_classifier: Stage, other_classifier: Stage
) -> None:
    """Every image of every shard has the row that the rule gives it; no shard is shifted against its images."""
    votes = _probabilities(toy_classifier, samples), _probabilities(other_classifier, samples)
    expected = apply_rule(np.arange(120), *votes, 0.9).assign(near_test=-1)
    pd.testing.assert_frame_equal(_table(samples, labels), expected, check_exact=False, rtol=1e-4, check_dtype=False)


def test_the_report_counts_the_table(samples: Stage, labels: Stage) -> None:
    """Kept, dropped and disagreeing images add up, in all and per class, and the filter did something."""
    report, table = labels.finished(LabelReport), _table(samples, labels)
    assert report is not None
    assert (report.num_images, report.num_kept, sum(report.kept_per_class)) == (120, table.kept.sum(), table.kept.sum())
    assert report.num_disagree == (table.first_class != table.second_class).sum()
    assert list(report.kept_per_class) == np.bincount(table.label[table.kept], minlength=10).tolist()
    assert list(report.dropped_per_class) == np.bincount(table.label[~table.kept], minlength=10).tolist()
    assert 0 < sum(report.dropped_per_class) <= report.num_disagree < 120


def test_one_table_lies_beside_each_shard(samples: Stage, labels: Stage) -> None:
    """Side tables are named as their shards; the shards themselves are as they were sampled."""
    names = {shard.name for shard in read_manifest(DataPlace.of(samples.folder)).shards}
    assert files_below(labels.folder) - {"stage.json"} == {INDEX, *(f"{name}.parquet" for name in names)}


def test_a_killed_labeling_goes_on_where_it_was(
    samples: Stage, labels: Stage, toy_classifier: Stage, other_classifier: Stage, digits: Stage, make_stage: MakeStage
) -> None:
    """Shards that were labelled before the kill are not labelled again, and the result is the same."""
    stage = make_stage("labels")
    given: dict[str, Any] = {
        "source": digits,
        "images": DataPlace.of(samples.folder),
        "first": toy_classifier,
        "second": other_classifier,
        "stage": stage,
    }
    with pytest.raises(StopHereError):
        label_shards(0.9, **given, on_progress=Killer(lambda done: any(stage.folder.glob("*.parquet"))))
    (first,) = files_below(stage.folder)
    before = (stage.folder / first).stat().st_mtime_ns
    report = label_shards(0.9, **given)
    assert report == labels.finished(LabelReport)
    assert (stage.folder / first).stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(_table(samples, stage), _table(samples, labels))


def test_a_filter_that_empties_a_class_is_refused(
    toy_classifier: Stage, other_classifier: Stage, digits: Stage, make_stage: MakeStage
) -> None:
    """A class without any synthetic image is refused by name, with how many were dropped and what to do."""
    few = make_stage("samples")
    sampling = SamplingConfig(shard_size=5, batch_size=5)
    sample_proxy(JitterProxy(num_images=5, sigma=0.05), sampling, source=digits, proxy=None, seed=0, stage=few)
    stage = make_stage("labels")
    with pytest.raises(DataIntegrityError, match=r"no synthetic image of class \d.* passes the filter \(\d of 5 dropped\)"):
        label_shards(
            0.9, source=digits, images=DataPlace.of(few.folder), first=toy_classifier, second=other_classifier, stage=stage
        )
    assert stage.record() is None


def test_a_damaged_shard_is_not_labelled(
    toy_classifier: Stage, other_classifier: Stage, digits: Stage, make_stage: MakeStage
) -> None:
    """Images are hashed before they are labelled."""
    broken = make_stage("samples")
    sampling = SamplingConfig(shard_size=20, batch_size=20)
    sample_proxy(JitterProxy(num_images=40), sampling, source=digits, proxy=None, seed=0, stage=broken)
    damage(broken.folder / "shard-000001.npy")
    with pytest.raises(DataIntegrityError, match=r"shard-000001\.npy is damaged"):
        label_shards(
            0.9,
            source=digits,
            images=DataPlace.of(broken.folder),
            first=toy_classifier,
            second=other_classifier,
            stage=make_stage("labels"),
        )
