"""How MLflow's pages show an experiment: saved views, with the columns and charts that matter, and links to them.

What its pages show is their own business and kept in each reader's browser; but a view that somebody saved is a tag of the
experiment, listed in the pages' «Views» menu, and opened by a link. These are such tags, in the form that MLflow 3.17's pages
write (``tests/e2e/test_pages.py`` looks at them in a browser). Where another version cannot read them, its pages say so and
show the experiment as they show any.
"""

import base64
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

VIEW_TAG = "mlflow.sharedViewState."
PIPELINES, MODELS = "pipelines", "models"
PARAMETERS = ("train.gamma", "seed", "train.synthetic_fraction", "train.objective.kind", "proxy.kind")
"""The first of them stands before the figures."""
ROBUST = ("autoattack_accuracy", "gate_search_accuracy", "pgd_accuracy", "clean_accuracy", "average_certified_radius")
CERTIFIED, DIFFERENCE, TRAINING = "certified_accuracy_", "difference/", "train/"
PICTURES, WIDE_CARDS = "Pictures", {"columns": 1, "cardHeight": 370}
"""One card in a row, so that the pictures of several runs stand beside one another."""
WIDE, NARROW = 150, 115
"""Pixels of a column: the pages' own cut off the names of metrics."""
ENDS = ("_low", "_high", "_p_value")


def write_views(metrics: Iterable[str], pictures: Iterable[str], moment: int) -> dict[str, str]:
    """The tags of an experiment whose runs have these metrics and pictures; ``moment`` (ms) is when they are written."""
    known = sorted(metrics)
    figures = [name for name in ROBUST if name in known] + [name for name in known if _is_figure(name, CERTIFIED)]
    sections = {
        "Results": figures,
        "Mixed against real-only": [name for name in known if _is_figure(name, DIFFERENCE)],
        "Training": [name for name in known if name.startswith(TRAINING)],
    }
    shown = {name for names in sections.values() for name in names}
    sections["Intervals and other figures"] = [name for name in known if name not in shown]
    views = (
        _View(PIPELINES, "Pipelines", "", ("gate",), None),
        _View(MODELS, "Models", "tags.`proxyrob.kind` = 'model'", ("sanity",), "metrics.`autoattack_accuracy`"),
    )
    return {f"{VIEW_TAG}{view.key}": view.write(figures, sections, tuple(pictures), moment) for view in views}


def view_link(experiment_id: str, key: str = PIPELINES, *, charts: bool = False) -> str:
    """The address of a view, after that of the server."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={key}{mode}"


def _is_figure(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and not name.endswith(ENDS)


@dataclass(frozen=True)
class _View:
    """One view: its name, which runs it lists, which of our tags it shows, and what it is ordered by. Children are folded below
    their parents only in the order that MLflow's pages have by themselves, the newest first."""

    key: str
    name: str
    search: str
    tags: tuple[str, ...]
    order: str | None

    def write(self, figures: list[str], sections: dict[str, list[str]], pictures: tuple[str, ...], moment: int) -> str:
        columns = [
            *(f"tags.`proxyrob.{name}`" for name in self.tags),
            *(f"params.`{name}`" for name in PARAMETERS[:1]),
            *(f"metrics.`{name}`" for name in figures),
            *(f"params.`{name}`" for name in PARAMETERS[1:]),
        ]
        charts = [_chart(name, f"section-{section}") for section, names in sections.items() for name in names]
        charts += [_picture(name, f"section-{PICTURES}") for name in pictures]
        titles = list(sections)
        titles[1:1] = [PICTURES] if pictures else []
        state = {
            "searchFilter": self.search,
            **({} if self.order is None else {"orderByKey": self.order, "orderByAsc": False}),
            "selectedColumns": columns,
            "columnOrder": columns,
            "columnWidths": {column: WIDE if column.startswith("metrics.") else NARROW for column in columns},
            "compareRunCharts": charts,
            "compareRunSections": [
                {"uuid": f"section-{title}", "name": title, "display": title != titles[-1], "isReordered": True}
                | (WIDE_CARDS if title == PICTURES else {})
                for title in titles
            ],
            "isAccordionReordered": True,
            "hideEmptyCharts": True,
        }
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        saved = {"name": self.name, "createdAt": moment, "updatedAt": moment, "state": f"deflate;{packed}"}
        return json.dumps(saved)


def _chart(metric: str, section: str) -> dict[str, Any]:
    """Curves where there are steps, bars else. MLflow's pages fill in what is left out, but for the range of a curve."""
    chart = _card("BAR", metric, section) | {"metricKey": metric}
    if metric.startswith(TRAINING):
        curve = {"xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear", "range": {}, "lineSmoothness": 0}
        chart |= {"type": "LINE", "selectedMetricKeys": [metric], "useGlobalXaxisKey": True, **curve}
    return chart


def _picture(name: str, section: str) -> dict[str, Any]:
    return _card("IMAGE", name, section) | {"imageKeys": [name], "step": 0, "showRunParams": False}


def _card(kind: str, name: str, section: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"chart-{name}",
        "displayName": name.removeprefix(DIFFERENCE),
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": True,
        "runsCountToCompare": 10,
    }
