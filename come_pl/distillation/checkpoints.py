"""What a distillation keeps on disk while it runs: checkpoints to go on from, and the best weights so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import safe_open
from safetensors.torch import save_file

from come_pl.distillation.module import DistillationModule
from come_pl.record import write_atomically

FOLDER, BEST = "checkpoints", "best.safetensors"
WHOLE = "whole"  # in a checkpoint that is a folder, once all of it is there


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints of one file that are there whole or not at all: Lightning's are moved from the system's temporary
    folder, which is a copy where that is another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        def save(partial: Path) -> None:
            with open(partial, "wb") as file:  # given a path, torch makes another error of a full disk
                torch.save(checkpoint, file)

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), save)


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step that was written whole."""
    # DeepSpeed's is a folder, with files of all processes
    found = [p for p in folder.glob("step=*.ckpt") if p.is_file() or (p / WHOLE).is_file()]
    return max(found, key=lambda p: int(p.stem.removeprefix("step=")), default=None)


def full_state(module: DistillationModule) -> dict[str, torch.Tensor]:
    """Trained parameters of the student, whole, on the CPU, whatever strategy shards them. Called on all ranks, and
    empty on all but the first: the others' host memory is not for copies that nobody reads.

    Where DeepSpeed computes in bf16, these are the fp32 weights of its optimizer.
    """
    state: dict[str, torch.Tensor] = {}
    main = module.global_rank == 0
    for name, parameter in module.student_model.named_parameters():
        if name not in module.trained:
            continue
        if parameter.dtype != torch.float32 and hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(parameter)
        elif hasattr(parameter, "full_tensor"):
            whole = parameter.full_tensor()
        else:
            whole = parameter
        if main:
            state[name] = whole.detach().to("cpu", copy=True)
    return state


def trained_count(module: DistillationModule) -> int:
    """Parameters that learn, whole: ZeRO-3 keeps parts of them. Adapters count until they are merged."""
    named = module.student_model.named_parameters()
    return sum(getattr(p, "ds_numel", p.numel()) for name, p in named if name in module.trained)


def _ends(trainer: Trainer) -> bool:
    """Whether the run ends with this batch."""
    loop = trainer.fit_loop
    epochs = trainer.current_epoch + loop.epoch_loop._num_ready_batches_reached()
    if loop.max_epochs not in (None, -1) and epochs >= loop.max_epochs:  # type: ignore[operator]
        return True
    return 0 <= trainer.max_steps <= trainer.global_step or trainer.should_stop and loop._can_stop_early


class Checkpoints(Callback):
    """Saves every `every` optimizer steps what a run goes on from, and removes the checkpoint before.

    Where a validation is due at such a step, or the run ends with it, the checkpoint is saved after it: Lightning takes
    a validation for done that a checkpoint before it still owed. This callback is the last, so that the others' states
    are those of its step.
    """

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every
        self.saved = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()

    def state_dict(self) -> dict[str, Any]:
        return {"saved": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict["saved"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop
        due = trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        if not due and not _ends(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self.saved or step % self.every:
            return
        self.saved = step
        before = sorted(self.folder.glob("step=*.ckpt")) if trainer.is_global_zero else []
        new = self.folder / f"step={step}.ckpt"
        trainer.save_checkpoint(new, weights_only=False)  # what a run goes on from is more; returns when all have saved
        if trainer.is_global_zero and new.is_dir():
            write_atomically(new / WHOLE, "")
        for old in before:
            if old != new:
                trainer.strategy.remove_checkpoint(old)


class KeepBest(Callback):
    """Keeps the trained weights of the lowest validation loss in a file, whatever strategy shards them.

    The file itself says which step and loss it is of, so a run that was killed need not remember. The last weights are
    validated even where Lightning would not: after max_steps, or between two validations.

    Attributes:
        step, loss: of the weights in the file; None and infinity while there are none.
        last: the trained weights at the end, read while their strategy still has them where it can gather them, on the
            first process; None if nothing was left to train.
        validated: step of the last validation.
    """

    def __init__(self, file: Path):
        self.file = file
        self.step: int | None = None
        self.loss = math.inf
        self.validated: int | None = None
        self.last: dict[str, torch.Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated = state_dict["validated"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        found: tuple[int | None, float] = (None, math.inf)
        if trainer.is_global_zero and self.file.is_file():
            with safe_open(self.file, "pt") as opened:
                told = opened.metadata()
            found = int(told["step"]), float(told["val_loss"])
        self.step, self.loss = trainer.strategy.broadcast(found)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or "val_loss" not in trainer.callback_metrics:
            return
        self.validated = trainer.global_step
        loss = float(trainer.callback_metrics["val_loss"])
        if not loss < self.loss:  # nor if it is NaN
            return
        self.step, self.loss = trainer.global_step, loss
        state = full_state(pl_module)
        if trainer.is_global_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            told = {"step": str(self.step), "val_loss": repr(loss)}
            write_atomically(self.file, lambda partial: save_file(state, partial, told))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.enable_validation and self.validated != trainer.global_step:
            trainer.validating = True  # as Lightning does between two batches
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self.last = full_state(pl_module)

    def weights(self) -> dict[str, torch.Tensor]:
        """Trained parameters by name in the student, on the CPU."""
        with safe_open(self.file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping


class Patience(EarlyStopping):
    """Stops after `patience` validations without a lower loss, and stays stopped when the run is taken up again.

    Lightning remembers the count but not that it has stopped: killed while its result is measured, a run would train
    on.
    """

    def __init__(self, patience: int):
        if patience < 1:
            raise ValueError(f"patience {patience}: expected at least 1 validation")
        super().__init__("val_loss", patience=patience, check_on_train_epoch_end=False)

    @property
    def exhausted(self) -> bool:
        return self.wait_count >= self.patience

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.should_stop or self.exhausted
