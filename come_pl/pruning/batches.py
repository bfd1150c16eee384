"""The calibration windows of a pruning run, as its module sees them: batches, parts of them, sums over processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from come_pl.pruning.race import Look
from come_pl.pruning.regression import folds_of
from come_pl.taps import targets_of


class CalibrationBatches(LightningModule):
    """Batches are kept from the first pass on.

    Attributes:
        batches: token ids and mask (batch, seq), and what the model gets as its attention mask.
    """

    def hold(self) -> None:
        """Begin without any batch."""
        self.batches: list[dict[str, Any]] = []
        self._targets: dict[int | None, float] = {}  # predicted tokens of all processes, by number of windows

    def first_batches(self, windows: int | None) -> list[int]:
        """Indices of the batches seen so far with the first `windows` calibration windows of all processes together,
        rounded up to whole batches; of all batches without a number."""
        taken, found = 0, []
        for index, batch in enumerate(self.batches):
            if windows is not None and taken * self.world >= windows:
                break
            found.append(index)
            taken += len(batch["input_ids"])
        return found

    def monitored(self, windows: int) -> dict[int, slice]:
        """This process's share of the first so many windows of all, which are dealt out in turn: batch → which of
        it."""
        left, found = -(-(windows - self.global_rank) // self.world), {}
        for index in self.first_batches(windows):
            count = min(left, len(self.batches[index]["input_ids"]))
            if count > 0:
                found[index], left = slice(0, count), left - count
        return found

    def looks(self, windows: int | None) -> Iterator[Look]:
        """The first windows of all processes in order: batches, the first of them one window at a time."""
        for number, index in enumerate(self.first_batches(windows)):
            if number == 0:
                yield from ((index, slice(row, row + 1)) for row in range(len(self.batches[index]["input_ids"])))
            else:
                yield index, slice(None)

    def part(self, look: Look) -> dict[str, Any]:
        """Some windows of a batch."""
        index, rows = look
        return {name: value if value is None else value[rows] for name, value in self.batches[index].items()}

    def targets(self, windows: int | None = None) -> float:
        """Predicted tokens of the calibration windows, or the first so many, of all processes; at least 1."""
        if windows not in self._targets:
            batches = [self.batches[index] for index in self.first_batches(windows)]
            counts = [targets_of(batch["mask"]).sum(dtype=torch.float64) for batch in batches]
            self._targets[windows] = max(float(self.sum(torch.stack(counts).sum())), 1.0)
        return self._targets[windows]

    def windows_by_fold(self, folds: int) -> list[int]:
        """How many windows of all processes are in each fold."""
        found = [fold for batch in self.batches for fold in folds_of(batch, folds)]
        counts = torch.tensor([found.count(fold) for fold in range(folds)], dtype=torch.float64)
        return [int(count) for count in self.sum(counts)]

    def check_folds(self, folds: int) -> None:
        """Warns where no fit can be tried on windows that it has not seen."""
        counts = self.windows_by_fold(folds)
        if sum(count > 0 for count in counts) < 2 and self.global_rank == 0:
            warnings.warn(
                f"the calibration windows ({sum(counts)}) are all of one kind, so that no fit can be tried on unseen "
                "ones and nothing is repaired; give more --data.tokens, or a shorter --data.seqlen",
                stacklevel=2,
            )

    def unseen_fold(self, folds: int) -> int:
        """The fold that is not fitted to where one is left out: the lowest that has windows."""
        return next((fold for fold, count in enumerate(self.windows_by_fold(folds)) if count), 0)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, on the CPU."""
        if distributed():
            value = value.to(self.device)
            torch.distributed.all_reduce(value)
        return value.cpu()

    def add_up(self, value: Tensor) -> None:
        """The same in place, where the value is: of one process it goes nowhere."""
        if distributed():
            value.copy_(self.sum(value))

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.trainer.world_size if self._trainer is not None else 1


def distributed() -> bool:
    """Whether there may be other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def inputs_of(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What the model gets of a batch: token ids and attention mask."""
    return batch["input_ids"], batch["attention"]
