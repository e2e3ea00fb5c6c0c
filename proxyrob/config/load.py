"""Reading a preset or a file, with changes, into one validated configuration."""

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from proxyrob.config.pipeline import PipelineConfig

MOST_BYTES, MOST_VALUES = 256 << 10, 20_000
"""Of a file that somebody calls a configuration; the longest preset has 150 values."""


def preset_names() -> tuple[str, ...]:
    """The presets that ship with the library."""
    return tuple(sorted(entry.name[: -len(".yaml")] for entry in _presets().iterdir() if entry.name.endswith(".yaml")))


def preset_text(name: str) -> str:
    """A preset's file, whose header says what it does, how long it takes and what to expect.

    Raises ``ValueError`` with the nearest name when there is no such preset.
    """
    if name not in preset_names():
        raise ValueError(f"there is no preset {name!r}{_nearest(name, preset_names())}; presets: {', '.join(preset_names())}")
    return (_presets() / f"{name}.yaml").read_text()


def load_config(name: str, changes: Iterable[str] = ()) -> PipelineConfig:
    """The configuration of a preset, or of a YAML file (``name`` ends in .yaml or .yml), with ``key.path=value`` changes.

    Raises ``ValueError`` whose text says which key is wrong, why, and what is expected.
    """
    config = _validate(_read(name))
    tree = config.dump()
    for change in changes:
        _apply(tree, change)
    return _validate(tree)


def flatten(config: BaseModel) -> dict[str, Any]:
    """Dotted keys and plain values, as they are written with ``--set`` and logged as parameters."""
    return dict(_leaves("", config.model_dump(mode="json")))


def explain(error: ValidationError) -> str:
    """One line for each fault: its key, what is wrong, what was given."""
    lines = []
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        known = _keys_at(path[:-1])
        key = ".".join(part for part in path if part not in _KINDS) or "configuration"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key}: there is no such key{_nearest(path[-1], known)}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: this key is missing")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            given = "" if fault["type"] == "value_error" else f" (got {fault['input']!r})"
            lines.append(f"{key}: {message}{given}" if path else message + given)
    return "\n".join(lines)


def _leaves(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), below)
    else:
        yield prefix, value


def _validate(tree: dict[str, Any]) -> PipelineConfig:
    try:
        config = PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error)) from error
    values = flatten(config)
    for key, given in _leaves("", tree):
        if isinstance(given, bool) and not isinstance(values.get(key), bool):
            message = f"{key}: expected a number or a name, got {str(given).lower()} (YAML reads yes, no, on and off so)"
            raise ValueError(message)  # noqa: TRY004  (a wrong configuration is a ValueError, whatever is wrong with it)
    return config


def _presets() -> Any:
    return resources.files("proxyrob.config") / "presets"


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _read(name: str, chain: tuple[str, ...] = ()) -> dict[str, Any]:
    if name in chain:
        raise ValueError(f"{' extends '.join((*chain, name))}: a configuration cannot extend itself")
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no file {name}; give a preset ({', '.join(preset_names())}) or the path of a YAML file")
        if (size_bytes := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{name} has {size_bytes} bytes, a configuration at most {MOST_BYTES}; give the right file")
        text = path.read_text()
    else:
        text = preset_text(name)
    try:
        tree = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
    _require_few(tree, name)
    if not isinstance(tree, dict):
        raise ValueError(  # noqa: TRY004  (the content of a file is wrong, not the type of an argument)
            f"{name}: expected keys and values, got {type(tree).__name__}"
        )
    base = tree.pop("extends", None)
    if base is None:
        return tree
    extended = str(base)
    if extended.endswith((".yaml", ".yml")):
        extended = str(Path(name).parent / extended)  # a file names its neighbours, wherever the program is started
    return _merge(_validate(_read(extended, (*chain, name))).dump(), tree)


def _require_few(tree: Any, name: str) -> None:
    """Raise ``ValueError`` when a tree has more values than any configuration: an alias in a list of aliases, ten levels deep,
    makes a page of YAML billions of values long."""
    waiting, count = [tree], 0
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += 1
        if count + len(waiting) > MOST_VALUES:
            raise ValueError(
                f"{name} has more than {MOST_VALUES} values, counting what its aliases (*) stand for; leave them out"
            )


def _merge(base: Any, change: Any) -> Any:
    """``change`` over ``base``, key by key.

    Another ``kind`` takes over the keys that it knows itself and that were set to something else than their default: each
    loss keeps the defaults of its own field.
    """
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    if "kind" in change and change["kind"] != base.get("kind"):
        known, former = _KINDS.get(str(change["kind"])), _KINDS.get(str(base.get("kind")))
        base = {
            key: value
            for key, value in base.items()
            if known is None or (key in known.model_fields and not (former and _is_default(former, key, value)))
        }
    merged = dict(base)
    for key, value in change.items():
        merged[key] = _merge(base.get(key), value)
    return merged


def _is_default(model: type[BaseModel], key: str, value: Any) -> bool:
    field = model.model_fields.get(key)
    return field is not None and not field.is_required() and field.default == value


def _apply(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"expected key.path=value, such as train.gamma=0.4, got {change!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: {text!r} is not a valid value") from error
    nested: Any = value
    parts = key.strip().split(".")
    for part in reversed(parts[1:]):
        nested = {part: nested}
    merged = _merge(tree, {parts[0]: nested})
    tree.clear()
    tree.update(merged)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _collect_kinds(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    kinds: dict[str, type[BaseModel]] = {}
    for field in model.model_fields.values():
        for below in _models_in(field.annotation):
            if "kind" in below.model_fields:
                kinds[below.model_fields["kind"].default] = below
            kinds |= _collect_kinds(below)
    return kinds


def _keys_at(path: list[str]) -> tuple[str, ...]:
    """The keys that a place in the tree may have; ``path`` names fields and, after a union, the chosen kind."""
    models: list[type[BaseModel]] = [PipelineConfig]
    for part in path:
        if part in _KINDS:
            models = [_KINDS[part]]
        else:
            models = [
                below
                for model in models
                if part in model.model_fields
                for below in _models_in(model.model_fields[part].annotation)
            ]
    return tuple(dict.fromkeys(key for model in models for key in model.model_fields))


_KINDS = _collect_kinds(PipelineConfig)
