"""Curves of a run whose optimizer steps are made of several batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn

from come_pl.distillation.curves import CURVES, Curves, read_rows


class Counting(LightningModule):
    """The loss of its n-th batch is n."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(())), 0
        self.latest: dict[str, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += 1
        self.latest = {"a": float(self.seen), "b": 0.5}
        return self.weight * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([{"mask": torch.ones(4)}] * 5, batch_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("accumulate", "expected"), [(1, [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]), (2, [1.5, 3.5, 5, 6.5, 8.5, 10])]
)
def test_a_row_for_each_step_is_the_mean_of_its_batches(accumulate: int, expected: list[float], tmp_path: Path) -> None:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[Curves(tmp_path)], accelerator="cpu", **quiet
    )
    trainer.fit(Counting())
    rows = read_rows(tmp_path / CURVES)
    assert [row["step"] for row in rows] == list(range(1, trainer.global_step + 1))
    assert [row["a"] for row in rows] == expected
    assert all(row["loss"] == row["a"] + 0.5 for row in rows) and rows[-1]["tokens"] == 40
