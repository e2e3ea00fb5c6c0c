"""In which fields two configurations differ, for people to read."""

import json
from collections.abc import Iterator
from typing import Any

MOST_SHOWN = 5
MOST_CHARACTERS = 60
INPUTS = "inputs"


def describe_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The fields in which the configurations of two stages differ, with both values: ``Train.values.steps: 10 and 20``.

    Where inputs alone differ it says which.
    """
    one, other = _fields(there), _fields(here)
    differing = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    if not differing:
        return "their configurations are equal, so another version of this program wrote it"
    prefix = f"{INPUTS}."
    only_inputs = all(name.startswith(prefix) for name in differing)
    shown = [
        f"{name.removeprefix(prefix) if only_inputs else name}: {_shorten(one.get(name))} and {_shorten(other.get(name))}"
        for name in differing[:MOST_SHOWN]
    ]
    if len(differing) > MOST_SHOWN:
        shown.append(f"and {len(differing) - MOST_SHOWN} more")
    return f"{'only inputs' if only_inputs else 'these fields'} differ, {', '.join(shown)}"


def _fields(configuration: dict[str, Any]) -> dict[str, str]:
    """Every value as JSON under its path (``RobustTrainConfig.values.batch_size``), the inputs last."""
    fields = {name: part for name, part in configuration.items() if name != INPUTS}
    if INPUTS in configuration:
        given = configuration[INPUTS]
        fields[INPUTS] = _named(given) if isinstance(given, list | tuple) else given
    return dict(_flatten(fields, ""))


def _named(inputs: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """The digests of a stage's inputs under their names, with their place in the list where a name comes again."""
    digests: dict[str, Any] = {}
    for place, given in enumerate(inputs, start=1):
        match given:
            case [str(name), str(digest)]:
                digests[f"{name}-{place}" if name in digests else name] = digest[:12]
            case _:
                digests[str(place)] = given
    return digests


def _flatten(value: Any, path: str) -> Iterator[tuple[str, str]]:
    match value:
        case dict() if value:
            for name, part in value.items():
                yield from _flatten(part, f"{path}.{name}")
        case list() | tuple() if value:
            for index, part in enumerate(value):
                yield from _flatten(part, f"{path}.{index}")
        case _:
            yield path.removeprefix("."), json.dumps(value, ensure_ascii=False)


def _shorten(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= MOST_CHARACTERS else f"{value[:MOST_CHARACTERS]}…"
