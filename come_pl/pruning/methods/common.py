"""What methods share that has no file of its own: checked options, and the first calibration windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule


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


def first_batches(module: PruningModule, windows: int | None) -> list[int]:
    """Indices of the batches with the first `windows` calibration windows of all processes together, rounded up to
    whole batches; of all batches without a number."""
    taken, found = 0, []
    for index, batch in enumerate(module.batches):
        if windows is None or taken * module.world < windows:
            found.append(index)
        taken += len(batch["input_ids"])
    return found
