"""Checkpoints of a training: there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from come_pl.distillation.checkpoints import Checkpoints, WholeCheckpoints, newest


def test_one_that_could_not_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plugin = tmp_path / "checkpoints", WholeCheckpoints()
    plugin.save_checkpoint({"step": 1, "weights": torch.ones(9)}, folder / "step=1.ckpt")
    save = torch.save

    def full(content: Any, file: Any) -> None:
        save(content, file)
        file.truncate(file.tell() // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        plugin.save_checkpoint({"step": 2}, folder / "step=2.ckpt")
    assert [file.name for file in folder.iterdir()] == ["step=1.ckpt"]
    found = newest(folder)
    assert found is not None
    assert torch.equal(plugin.load_checkpoint(found, weights_only=True)["weights"], torch.ones(9))


def test_deepspeeds_is_there_once_all_processes_have_saved(tmp_path: Path) -> None:
    """`latest`, DeepSpeed's own word for it, is written by the first process while others still save."""

    class Strategy:
        checkpoint_io = None
        removed: ClassVar[list[Path]] = []

        def remove_checkpoint(self, path: Path) -> None:
            self.removed.append(path)

    def save(path: Path, weights_only: bool) -> None:
        (path / "checkpoint").mkdir(parents=True)
        (path / "latest").write_text("checkpoint")
        found.append(newest(tmp_path))

    found: list[Path | None] = []
    trainer: Any = SimpleNamespace(is_global_zero=True, strategy=Strategy(), save_checkpoint=save)
    callback = Checkpoints(tmp_path, 1)
    for step in (1, 2):
        trainer.global_step = step
        callback._save(trainer)
        assert newest(tmp_path) == tmp_path / f"step={step}.ckpt"
    assert found == [None, tmp_path / "step=1.ckpt"] and Strategy.removed == [tmp_path / "step=1.ckpt"]


class Own(TorchCheckpointIO):
    pass


@pytest.mark.parametrize(("given", "used"), [(None, WholeCheckpoints), (Own(), Own)])
def test_it_is_what_trainers_write_unless_told_otherwise(tmp_path: Path, given: Any, used: type) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, plugins=given, default_root_dir=tmp_path)
    Checkpoints(tmp_path, 1).setup(trainer, None, "fit")
    assert type(trainer.strategy.checkpoint_io) is used
