"""The calibration windows of a pruning run, as its module sees them: batches, parts of them, sums over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from come_pl.pruning.race import Look
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
        """This process's share, rounded up, of the first so many windows of all: batch → which of it."""
        left, found = -(-windows // self.world), {}
        for index in self.first_batches(windows):
            count = min(left, len(self.batches[index]["input_ids"]))
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

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, on the CPU."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            value = value.to(self.device)
            torch.distributed.all_reduce(value)
        return value.cpu()

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.trainer.world_size if self._trainer is not None else 1


def inputs_of(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What the model gets of a batch: token ids and attention mask."""
    return batch["input_ids"], batch["attention"]
