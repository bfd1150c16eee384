"""Loss curves on disk while training runs."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from come_pl.record import write_atomically

CURVES, VALIDATION = "curves.csv", "validation.csv"
COLUMNS = ["step", "tokens", "seconds", "loss"]


def read_rows(file: Path) -> list[dict[str, float]]:
    """Whole rows of a curve; a row that a kill cut in two is left out."""
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8") as opened:
        rows = [r for r in csv.DictReader(opened) if None not in r and None not in r.values() and "" not in r.values()]
    return [{k: float(v) for k, v in row.items()} for row in rows]


class Curves(Callback):
    """Appends each optimizer step's losses, the means over its batches, to `curves.csv`, and the validation loss to
    `validation.csv`.

    Rows after the step that a run resumes from are removed first: the file is that of an uninterrupted run.

    Attributes:
        tokens, seconds: trained on so far, resumes included, and the time that this took, validation left out.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokens, self.seconds = 0, 0.0
        self._begin = 0.0
        self._step, self._since = 0, list[Mapping[str, float]]()  # of the last row; losses of the batches since

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        self._since.clear()
        if trainer.is_global_zero:
            for name in (CURVES, VALIDATION):
                rows = [r for r in read_rows(self.folder / name) if r["step"] <= trainer.global_step]
                if rows:
                    lines = [",".join(rows[0]), *(",".join(_tidy(v) for v in row.values()) for row in rows)]
                    write_atomically(self.folder / name, "\n".join(lines) + "\n")
                else:
                    (self.folder / name).unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += time.perf_counter() - self._begin
        self.tokens += int(batch["mask"].sum()) * trainer.world_size
        if not trainer.is_global_zero:
            return
        self._since.append(dict(pl_module.latest))
        if trainer.global_step > self._step:  # an epoch's last step may come before a whole accumulation
            losses = means(self._since)
            row = {"step": trainer.global_step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
            self._append(CURVES, row | {"loss": sum(losses.values())} | losses)
            self._step = trainer.global_step
            self._since.clear()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and "val_loss" in trainer.callback_metrics:
            loss = float(trainer.callback_metrics["val_loss"])
            self._append(VALIDATION, {"step": trainer.global_step, "val_loss": loss})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        file = self.folder / name
        columns: list[str] = []
        if file.is_file():
            with open(file, encoding="utf-8") as opened:
                columns = opened.readline().strip().split(",")
        extended = [*columns, *(c for c in row if c not in columns)]
        if extended != columns:  # first row, or one layer after another: a new column
            rows = read_rows_loose(file)
            lines = [",".join(extended), *(",".join(r.get(c) or "nan" for c in extended) for r in rows)]
            write_atomically(file, "\n".join(lines) + "\n")
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(",".join(_tidy(row.get(c, math.nan)) for c in extended) + "\n")


def means(batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each loss, over the batches that have it."""
    names = dict.fromkeys(name for losses in batches for name in losses)
    return {name: fmean(losses[name] for losses in batches if name in losses) for name in names}


def read_rows_loose(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _tidy(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.7g}"
