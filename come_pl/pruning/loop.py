"""The pruning loop: a callback that ends each epoch with one step of a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy

from come_pl.pruning.methods.base import Method
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Meter, Record, Step


def retires(method: Method, refit: Refit) -> bool:
    """Whether dense layers that are gone from the student go to files until the run ends: nothing reads them."""
    return method.spares_teacher and not refit.on


class ProgressivePruning(Callback):
    """Ends each epoch with one step, writes the record, and stops the fit at the target depth.

    Args:
        method: decides the steps.
        target_layers: depth to stop at.
        refit: repair in closed form after each step.
        after_step: called on the first process after each step, with the module.
    """

    def __init__(
        self,
        method: Method,
        target_layers: int,
        after_step: Callable[[PruningModule], None] | None = None,
        refit: Refit | None = None,
    ):
        self.method, self.target_layers, self.after_step = method, target_layers, after_step
        self.refit = refit or Refit()
        self.steps_done = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PruningModule)
        self.meter = Meter(pl_module.device)
        pl_module.keeps_dense = self.refit.on
        self.announce(pl_module)
        pl_module.pass_windows = None if self.refit.needs else self.method.pass_windows
        pl_module.statistics.to(pl_module.device)

    def announce(self, module: PruningModule) -> None:
        """Tell what the next step needs measured."""
        left = module.record.layers - self.target_layers
        module.needs = self.method.needs_for(module.record) | self.refit.needs
        module.channel_windows = 0 if module.record.steps else self.method.channel_windows
        # processes race sites on what each of them sees, and would not agree
        alone = module.world == 1 and not self.refit.needs and left > 0
        module.sites.begin(self.method.sites(module.record, left) if alone else None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PruningModule)
        record: Record = pl_module.record
        # compute() sums over processes, so each of them takes the same decision
        statistics = pl_module.statistics.compute() if pl_module.needs - {"streams"} else {}
        # torchmetrics makes a number of what has one element
        statistics = {name: torch.atleast_1d(value) for name, value in statistics.items()}
        pl_module.sites.settle(statistics, pl_module.span)
        for name, value in statistics.items():
            if not bool(value.isfinite().all()):
                raise NotFinite(f"{name} of the calibration pass is not finite; the model overflows in this dtype")
        decision = self.method(pl_module, statistics, record, remove=record.layers - self.target_layers)
        step = decision.step
        pl_module.do(step, decision.layer)
        if retires(self.method, self.refit):
            pl_module.retire()
        record.append(step)
        self.refit.after(pl_module, step, record, last=record.layers <= self.target_layers)
        self.announce(pl_module)
        wanted = trainer.max_steps
        done = record.layers <= self.target_layers or (wanted is not None and 0 <= wanted <= self.steps_done + 1)
        # on the way to a repair at the end the student is what nobody gets: measured only where a pass follows anyhow
        if done or pl_module.needs or not self.refit.ends:
            step.loss, step.kl = pl_module.monitor(ahead=record.layers > self.target_layers)
        step.seconds, step.peak_gib = self.meter.seconds, self.meter.peak_gib
        self.steps_done += 1
        if trainer.is_global_zero:
            record.write()
            if self.after_step is not None:
                self.after_step(pl_module)
        shown = {"layers": float(record.layers), "loss": step.loss, "kl": step.kl}
        pl_module.log_dict({k: v for k, v in shown.items() if v is not None}, prog_bar=True, logger=False)
        log_step(trainer, step)
        trainer.should_stop |= done

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PruningModule)
        pl_module.recall()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def log_step(trainer: Trainer, step: Step) -> None:
    """Write a step to the trainer's loggers: depth, loss, KL, seconds, and the scores of the place that was chosen."""
    metrics = {"layers": float(len(step.groups)), "loss": step.loss, "kl": step.kl, "seconds": step.seconds}
    for name, values in step.scores.items():
        if step.layers[0] < len(values):
            metrics[f"score/{name}"] = values[step.layers[0]]
    for logger in trainer.loggers:
        logger.log_metrics({k: v for k, v in metrics.items() if v is not None}, step=step.step)
        logger.save()


class PruningBar(TQDMProgressBar):
    """Lightning's progress bar; an epoch is named by what it does."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module, *args)
        assert isinstance(pl_module, PruningModule)
        first = f", from layer {pl_module.start}" if pl_module.start else ""
        self.train_progress_bar.set_description(f"measuring {pl_module.record.layers} layers{first}")


class PruningDDP(DDPStrategy):
    """DDP for a module with nothing to train: processes and collectives without the gradient reducer, which refuses
    such a module."""

    def configure_ddp(self) -> None:
        pass
