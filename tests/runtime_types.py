"""The runtime check of types and shapes that every test runs under: jaxtyping's annotations, enforced by beartype."""

from collections.abc import Callable
from typing import Any, Self, TypeVar, get_args

from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable[..., Any])

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as it is to pyright


def check_types(function: F) -> F:
    """``beartype``, except for annotations that it cannot check on a function by itself: ``Self``, and a Protocol that is
    not ``runtime_checkable`` (pyright checks these two).

    jaxtyping hands over copies of the signatures, so nothing of the library changes.
    """
    for name, hint in list(function.__annotations__.items()):
        if _is_uncheckable(hint):
            function.__annotations__[name] = Any
    return _check(function)


def _is_uncheckable(hint: Any) -> bool:
    if isinstance(hint, list | tuple):
        return any(_is_uncheckable(part) for part in hint)
    if hint is Self or (getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)):
        return True
    return _is_uncheckable(get_args(hint))
