"""What the flows of a Prefect server are asked for: Prefect's pages show it as forms, its server refuses what does not fit."""

import inspect
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, get_args, get_origin

from prefect.runtime import flow_run
from prefect.utilities.callables import parameter_schema
from pydantic import Field
from pydantic.fields import FieldInfo

Preset = Annotated[
    str,
    Field(
        title="Preset",
        description="A preset by name (proxyrob presets lists them), or the absolute path of a YAML file on the worker.",
        min_length=1,
        max_length=200,
        examples=["digits", "digits-l2", "cifar10-paper"],
    ),
]
Changes = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[^=\s]+=", title="key=value")], ...],
    Field(
        title="Changed settings",
        description="Each as key=value, such as train.gamma=0.4 or seed=1. A setting that does not exist fails the run.",
        max_length=50,
    ),
]
Output = Annotated[
    str | None,
    Field(
        title="Output folder",
        description="Where report.json, pictures, model and tables are written, on the worker. "
        "Empty: the folder of the run in PROXYROB_HOME.",
    ),
]
WeeklySeed = Annotated[
    bool,
    Field(
        title="Seed of the week",
        description="Train with year and calendar week as seed (202648), so that a weekly schedule makes another challenger "
        "each time instead of finding the last one done.",
    ),
]


def name_run() -> str:
    """The name of a flow run: its preset and what was changed in it."""
    given = flow_run.parameters
    weekly = ["seed of the week"] if given.get("weekly_seed") else []
    return " ".join([str(given.get("preset", "")), *given.get("changes", ()), *weekly])


def week_of(moment: datetime) -> int:
    """Year and calendar week of a moment as one number."""
    year, week, _ = moment.isocalendar()
    return 100 * year + week


def build_form(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a flow's parameters with the titles and descriptions of their annotations, which Prefect's own lacks."""
    schema = parameter_schema(function).model_dump_for_openapi()
    for name, parameter in inspect.signature(function).parameters.items():
        described = get_args(parameter.annotation)[1:] if get_origin(parameter.annotation) is Annotated else ()
        for field in described:
            if isinstance(field, FieldInfo):
                shown = {"title": field.title, "description": field.description, "examples": field.examples}
                schema["properties"][name].update({key: value for key, value in shown.items() if value is not None})
    return schema
