"""What an error of another library says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of its message, or else the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
