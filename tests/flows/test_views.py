"""Saved views of an experiment, as MLflow's pages read them."""

import base64
import json
import zlib
from typing import Any

import pytest

from flows.records.views import MODELS, PIPELINES, VIEW_TAG, view_link, write_views

METRICS = {
    *(
        f"{name}{end}"
        for name in ("autoattack_accuracy", "clean_accuracy", "certified_accuracy_0.25")
        for end in ("", "_low", "_high")
    ),
    *("difference/autoattack", "difference/autoattack_p_value", "train/loss", "train/smooth/loss", "abstained"),
}
LONGEST_TAG = 5000
"""What MLflow takes as the value of an experiment's tag."""


def open_view(key: str, metrics: set[str] = METRICS) -> dict[str, Any]:
    saved = json.loads(write_views(metrics, ["certified-accuracy"], 7)[VIEW_TAG + key])
    assert (saved["createdAt"], saved["updatedAt"]) == (7, 7)
    return json.loads(zlib.decompress(base64.b64decode(saved["state"].removeprefix("deflate;"))))


@pytest.mark.parametrize("key", [PIPELINES, MODELS])
def test_every_metric_has_its_chart_once(key: str) -> None:
    """Figures first, in the order that matters; curves as lines; intervals in the last section, which is folded."""
    view = open_view(key)
    charts, sections = view["compareRunCharts"], view["compareRunSections"]
    titles = {section["uuid"]: section["name"] for section in sections}
    shown = {chart["metricKey"]: titles[chart["metricSectionId"]] for chart in charts if chart["type"] != "IMAGE"}
    assert shown.keys() == METRICS
    assert [name for name, title in shown.items() if title == "Results"] == [
        "autoattack_accuracy",
        "clean_accuracy",
        "certified_accuracy_0.25",
    ]
    assert {name for name, title in shown.items() if title == sections[-1]["name"]} >= {"abstained", "clean_accuracy_low"}
    assert [section["display"] for section in sections] == [True] * (len(sections) - 1) + [False]
    assert {chart["metricKey"] for chart in charts if chart["type"] == "LINE"} == {"train/loss", "train/smooth/loss"}
    assert [chart["imageKeys"] for chart in charts if chart["type"] == "IMAGE"] == [["certified-accuracy"]]
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_columns_are_in_order() -> None:
    """What sets runs apart stands before the figures; the columns are shown in the order in which they are listed."""
    view = open_view(PIPELINES)
    assert view["columnOrder"] == view["selectedColumns"]
    assert view["selectedColumns"][:3] == ["tags.`proxyrob.gate`", "params.`train.gamma`", "metrics.`autoattack_accuracy`"]
    assert not any(column.endswith(("_low`", "_high`")) for column in view["selectedColumns"])
    assert "orderByKey" not in view, "children fold only in MLflow's own order"
    assert open_view(MODELS)["searchFilter"] == "tags.`proxyrob.kind` = 'model'"


def test_a_view_of_many_metrics_fits_a_tag() -> None:
    """Thirty radii with their intervals and differences are no more than MLflow takes."""
    many = {f"certified_accuracy_{k / 20:g}{end}" for k in range(30) for end in ("", "_low", "_high")}
    many |= {f"difference/certified_{k / 20:g}{end}" for k in range(30) for end in ("", "_low", "_high", "_p_value")}
    assert all(len(value) < LONGEST_TAG for value in write_views(METRICS | many, ["certified-accuracy"], 7).values())


def test_links_open_views_among_trained_models() -> None:
    """The address names the view, and the pages of model training rather than those of language models."""
    assert view_link("3") == "#/experiments/3/runs?workflowType=machine_learning&viewStateShareKey=pipelines"
    assert view_link("3", MODELS, charts=True).endswith("viewStateShareKey=models&compareRunsMode=CHART")
