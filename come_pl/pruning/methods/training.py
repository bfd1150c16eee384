"""Training of a few layers in the middle of a pruning run, through Lightning.

`fit` starts a Trainer of its own inside the callback of the run's Trainer (one device a process, no loggers, no
checkpoints). Gradients are summed over processes here, so that each of them ends with the same weights. Nothing is held
but what the pruning module holds: each step asks it for the streams of one calibration batch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader

from come_pl.decoder import Decoder
from come_pl.pruning.batches import inputs_of
from come_pl.taps import stream_from

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule
    from come_pl.record import Record

Loss = Callable[[int], tuple[Tensor, Tensor]]  # batch index → (sum over what is counted, how many are counted)


def generator(record: Record) -> torch.Generator:
    """Random numbers of one step: by the run's seed (`seed_everything`) and the step's number, resumed or not."""
    return torch.Generator().manual_seed((torch.initial_seed() + len(record.steps)) % 2**63)


def usable(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of `module.batches` whose tensors autograd may keep (those made in inference mode it may not)."""
    return {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in batch.items()}


def run_layers(decoder: Decoder, layers: Mapping[int, nn.Module], batch: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """The stream (batch, seq, hidden) after `layers`, run in the places that they are given by on the stream `hidden`;
    places between them that are missing are passed over."""
    found: list[Tensor] = []

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        found.append(stream_from(output))

    first, last = min(layers), max(layers)
    skip = [i for i in range(first, last) if i not in layers]
    handle = layers[last].register_forward_hook(after)
    try:
        decoder.run(*inputs_of(batch), start=first, hidden=hidden, swap=layers, skip=skip, stop=last + 1)
    finally:
        handle.remove()
    return found[0]


class _Fit(LightningModule):
    def __init__(
        self, net: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, schedule: Callable[[int], float]
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer, self.schedule = net, loss, optimizer, schedule
        self.losses: list[float] = []  # mean of each epoch

    def configure_optimizers(self) -> Any:
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.net.eval()  # no dropout
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def training_step(self, index: int, step: int) -> Tensor:
        total, count = self.loss(int(index))
        both = torch.stack([total.detach().double(), count.double()])
        _add_up(both)
        self.sums += both
        return total / both[1].clamp(min=1).to(total.dtype)

    def on_after_backward(self) -> None:
        for parameter in self.net.parameters():
            if parameter.grad is not None:
                _add_up(parameter.grad)

    def on_train_epoch_end(self) -> None:
        self.losses.append(float(self.sums[0] / self.sums[1].clamp(min=1)))


class _Bar(TQDMProgressBar):
    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"training, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")


def fit(
    module: PruningModule,
    net: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    order: torch.Generator,
    floor: float = 0.0,
    clip: float | None = None,
    precision: Any = None,
) -> list[float]:
    """Train what requires a gradient in `net`, one optimiser step a calibration batch, learning rates on a cosine.

    Args:
        module: gives the batches and the device; its own weights must not be among those of `net`, which ends on the
            CPU.
        loss: of one batch; its sum over processes is divided by their count.
        order: shuffles the batches.
        floor: where the cosine ends, as a share of the first learning rates; 1 keeps them.
        clip: largest norm of the gradients.
        precision: Lightning's; by default bf16-mixed for a model in half precision, else fp32.

    Returns:
        Mean loss of each epoch.

    Raises:
        ValueError: a loss that is not finite.
    """
    steps = max(epochs * len(module.batches), 1)
    dtype = next(module.student_model.parameters()).dtype
    half = dtype in (torch.bfloat16, torch.float16)
    if (
        dtype == torch.float16
        and module.device.type == "cpu"
        and any(isinstance(m, nn.LayerNorm) for m in net.modules())
    ):
        raise ValueError("this method trains no layers in float16 on a CPU; give --model.dtype bfloat16 or float32")
    outer = module._trainer
    bar = outer is not None and outer.is_global_zero and outer.progress_bar_callback is not None  # the run shows one
    fitted = _Fit(net, loss, optimizer, lambda t: floor + (1 - floor) * (1 + math.cos(math.pi * t / steps)) / 2)
    with _quiet():
        trainer = Trainer(
            accelerator=module.device.type,
            devices=[module.device.index or 0] if module.device.type == "cuda" else 1,
            precision=precision or ("bf16-mixed" if half else "32-true"),
            max_epochs=epochs,
            gradient_clip_val=clip,
            callbacks=[_Bar()] if bar else None,
            plugins=[LightningEnvironment()],  # a launcher's own would ask for as many devices as it started processes
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=bar,
        )
        batches: Any = range(len(module.batches))
        trainer.fit(fitted, DataLoader(batches, batch_size=None, shuffle=True, generator=order))
    if not all(map(math.isfinite, fitted.losses)):
        raise ValueError(f"training gave a loss that is not finite ({fitted.losses[-1]}); use a lower learning rate")
    return fitted.losses


def _add_up(value: Tensor) -> None:
    """Sum over processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a Trainer says about itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
