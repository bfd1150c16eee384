"""What methods share that has no file of its own: checked options."""

from __future__ import annotations

from typing import Any, get_args


def check(**settings: tuple[Any, Any]) -> None:
    """Refuses settings given as name=(value, least value | Literal of the values it may take); None is not checked
    against a least value.

    Raises:
        ValueError: the first that is not allowed, by name.
    """
    for name, (value, allowed) in settings.items():
        choices = get_args(allowed)
        if choices and value not in choices:
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(str, choices))}")
        if not choices and value is not None and not value >= allowed:
            raise ValueError(f"{name} {value}: at least {allowed}")
