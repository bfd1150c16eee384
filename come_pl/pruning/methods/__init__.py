"""Pruning methods, one file each, by name."""

from __future__ import annotations

import difflib

from come_pl.pruning.methods.base import Method
from come_pl.pruning.methods.come import CoMe
from come_pl.pruning.methods.come_p import CoMeP

METHODS: dict[str, type[Method]] = {"come": CoMe, "come_p": CoMeP}
ALIASES = {"concat_merge": "come", "concat_merge_P": "come_p"}


class UnknownMethod(ValueError):
    """No method of that name."""


def find(name: str) -> tuple[str, type[Method]]:
    """(canonical name, class) of a method. Raises UnknownMethod, listing those known."""
    canonical = ALIASES.get(name, name)
    if canonical not in METHODS:
        known = [*METHODS, *ALIASES]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownMethod(f"method {name!r} is not known; known: {', '.join(known)}{hint}")
    return canonical, METHODS[canonical]
