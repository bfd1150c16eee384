"""The LightningModule of pruning: a teacher, a student that shares its untouched layers, and what is read off them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from come_pl import record as records
from come_pl.decoder import Decoder, attention_mask
from come_pl.record import Record, Step
from come_pl.surgery import share
from come_pl.taps import (
    LayerStatistics,
    boundaries,
    losses_and_divergences,
    projection_inputs,
    states_for,
    stream_at,
    targets_of,
    token_losses,
)


class NotFinite(ValueError):
    """Calibration gave NaN or infinity."""


class PruningModule(LightningModule):
    """Holds the dense model (teacher) and the model being pruned (student), and collects statistics of the student.

    One epoch is one pass over the calibration windows. After a step only the layers from the lowest changed one upward
    run again, from the states kept at every boundary.

    Args:
        path: Dense model: `embedded` (SmolLM2-135M-Instruct), a hub id, a folder, a .gguf file, or package:NAME.
        dtype: auto (the checkpoint's own on an accelerator, float32 on a CPU), float32, bfloat16 or float16.
        cache: Where the streams between layers are kept for the next pass: ram, or none (every pass runs all layers;
            less memory, the same result).
        monitor: Number of calibration windows, rounded up to whole batches, on which loss and KL(teacher || student)
            are measured after each step.
    """

    def __init__(
        self,
        path: str = "embedded",
        dtype: str = "auto",
        cache: Literal["ram", "none"] = "ram",
        monitor: int = 4,
    ):
        super().__init__()
        if monitor < 1:
            raise ValueError(f"monitor {monitor}: at least 1 window is measured after each step")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.path, self.dtype_name, self.cache, self.monitor_windows = path, dtype, cache, monitor
        self.needs: frozenset[str] = frozenset()
        self.span = 2

    def configure_optimizers(self) -> None:
        return None

    def attach(self, model: Any, record: Record, *, needs: Collection[str], span: int = 2) -> None:
        """Give the module its dense model, the record to go on from, and what its method needs measured."""
        self.teacher_model, self.record = model.requires_grad_(False), record
        self.student_model = records.replay(record, model) if record.steps else share(model)
        self.teacher, self.student = Decoder(self.teacher_model), Decoder(self.student_model)
        self.needs, self.span = frozenset(needs), span
        self.start = 0  # lowest layer that the next pass runs
        self.batches: list[dict[str, Any]] = []
        self._states: list[Tensor | None] = []  # of each batch: (boundaries, batch, seq, hidden)
        self.valid = 0  # highest boundary of `_states` that is the student's as it is
        self._teacher_states: dict[int, Tensor] = {}  # the same of the teacher, once something asks for them
        self._teacher_final: dict[int, Tensor] = {}
        self._ahead: set[int] = set()  # batches that the next pass need not run: monitoring measured them
        self._targets: float | None = None  # predicted tokens of all processes
        self.statistics = self._fresh_statistics()

    def _fresh_statistics(self) -> LayerStatistics:
        shape = self.student.geometry
        channels = (shape.heads * shape.head_dim, shape.ffn) if "channel_intensity" in self.needs else None
        return LayerStatistics(len(self.student), self.span, channels)

    # -- one pass -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self.student_model.eval()
        self.teacher_model.eval()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Runs the student from the lowest changed layer and adds to the statistics. No loss, no gradient."""
        with torch.inference_mode():
            if len(self.batches) <= batch_idx:
                # asked once: `all()` waits for the device
                self.batches.append(batch | {"attention": attention_mask(batch["mask"])})
                self._states.append(None)
                if batch_idx in self.first_batches(self.monitor_windows):
                    self._teacher_final[batch_idx] = self.teacher.run(*_inputs(self.batches[batch_idx]))
            if not self.needs:  # a method that looks at weights only
                return
            if batch_idx not in self._ahead:
                self._measure(batch_idx)
            if self.cache != "none":
                self.valid = len(self.student)

    def _measure(self, batch_idx: int) -> Tensor:
        """One batch of a pass; its final hidden states (batch, seq, hidden)."""
        kept, mask = self._states[batch_idx], self.batches[batch_idx]["mask"]

        def seen(kind: str, layer: int, x: Tensor) -> None:
            self.statistics.add_channels(kind, layer, x, mask)

        with contextlib.ExitStack() as hooks:
            found = hooks.enter_context(boundaries(self.student, self.start))
            if "channel_intensity" in self.needs:
                hooks.enter_context(projection_inputs(self.student, self.start, seen))
            final = self._forward(batch_idx, self.start)
        below = [] if kept is None else [s.to(mask.device, non_blocking=True) for s in kept[: self.start + 1]]
        if self.needs - {"streams"}:
            self.statistics.update(states_for(found, below), mask, self.start)
        if self.cache != "none":
            self._keep(batch_idx, found)
        return final

    def _keep(self, batch_idx: int, found: dict[int, Tensor]) -> None:
        """Copies the boundaries above the lowest that ran to the batch's store: one block, filled again in each pass,
        because many small ones would leave the heap in pieces (twice the memory, measured with glibc)."""
        store = self._states[batch_idx]
        if store is None:
            first = found[0]
            store = torch.empty((len(self.student) + 1, *first.shape), dtype=first.dtype, device="cpu")
            self._states[batch_idx] = store
        # the embeddings change too when the stream is scaled
        for boundary in range(self.start + 1 if self.start else 0, len(self.student) + 1):
            store[boundary].copy_(found[boundary])

    def _forward(self, batch_idx: int, start: int, **arrangement: Any) -> Tensor:
        batch, kept = self.batches[batch_idx], self._states[batch_idx]
        if kept is None:
            start = 0
        hidden = kept[start] if kept is not None and start else None
        return self.student.run(*_inputs(batch), start=start, hidden=hidden, **arrangement)

    # -- what methods may ask for -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def stream(self, batch_idx: int, boundary: int) -> Tensor:
        """The student's stream (batch, seq, hidden) before layer `boundary`, of one batch of `batches`."""
        kept = self._states[batch_idx]
        if kept is not None and boundary <= self.valid:
            return kept[boundary].to(self.device, non_blocking=True)
        start, hidden = 0, None
        if kept is not None and self.valid > 0:
            start, hidden = self.valid, kept[self.valid].to(self.device)
        return stream_at(self.student, boundary, *_inputs(self.batches[batch_idx]), start=start, hidden=hidden)

    @torch.inference_mode()
    def teacher_stream(self, batch_idx: int, boundary: int) -> Tensor:
        """The teacher's stream (batch, seq, hidden) before its layer `boundary`, of one batch of `batches`."""
        if self.cache == "none":
            return stream_at(self.teacher, boundary, *_inputs(self.batches[batch_idx]))
        kept = self._teacher_states.get(batch_idx)
        if kept is None:
            with boundaries(self.teacher) as found:
                self.teacher.run(*_inputs(self.batches[batch_idx]))
            kept = self._teacher_states[batch_idx] = torch.stack([found[b] for b in range(len(self.teacher) + 1)]).cpu()
        return kept[boundary].to(self.device, non_blocking=True)

    @torch.inference_mode()
    def loss(
        self,
        start: int = 0,
        *,
        skip: Collection[int] = (),
        swap: Mapping[int, nn.Module] | None = None,
        bound: float = math.inf,
    ) -> float:
        """Calibration loss (nats a token) of the student with layers skipped or swapped.

        Args:
            start: lowest layer that differs from the student; layers below are not run.
            bound: a loss already found; infinity is returned for one above it, as soon as that is sure. One that
                equals it is returned: which of equals wins is the caller's to say.
        """
        targets = self.targets()
        # (nats, processes that gave up), on the device: only a bound makes the host wait for each batch
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(self.batches):
            hidden = self._forward(index, start, skip=skip, swap=swap)
            total[0] += token_losses(self.student, hidden, batch["input_ids"], batch["mask"]).sum(dtype=torch.float64)
            # a quotient, as what is returned: bound * targets may round to below the sum that made the bound
            if bound < math.inf and float(total[0]) / targets > bound:
                total[1] = 1  # this process alone is above the bound, so the sum is
                break
        nats, gave_up = self.sum(total).tolist()
        return math.inf if gave_up or nats / targets > bound else nats / targets

    def targets(self) -> float:
        """Predicted tokens of the calibration windows of all processes, at least 1."""
        if self._targets is None:
            counts = [targets_of(batch["mask"]).sum(dtype=torch.float64) for batch in self.batches]
            self._targets = max(float(self.sum(torch.stack(counts).sum())), 1.0)
        return self._targets

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, on the CPU."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            value = value.to(self.device)
            torch.distributed.all_reduce(value)
        return value.cpu()

    # -- steps ------------------------------------------------------------------------------------------------------

    def do(self, step: Step, layer: nn.Module | None = None) -> None:
        """Apply a step to the student; the next pass starts at the lowest changed layer."""
        records.apply(step, self.student, layer)
        lowest = min([*step.layers, *step.layers_with_weights])
        self.changed_from(-1 if step.scale is not None else lowest)  # a scale changes the embeddings too

    def changed_from(self, lowest: int) -> None:
        """The next pass starts at layer `lowest`: the student is another from there on."""
        self._ahead.clear()
        self.valid = min(self.valid, lowest)
        self.start = 0 if self.cache == "none" else max(self.valid, 0)  # lower, if no pass followed the step before
        self.statistics = self.statistics.carry(len(self.student), self.start)

    @torch.inference_mode()
    def advance(self, layer: int) -> None:
        """Run one layer of the student again, so that the stream after it is valid."""
        if self.cache == "none":
            return
        for index, store in enumerate(self._states):
            assert store is not None and self.valid >= layer, "streams are advanced from below"
            store[layer + 1].copy_(
                stream_at(
                    self.student,
                    layer + 1,
                    *_inputs(self.batches[index]),
                    start=layer,
                    hidden=store[layer].to(self.device),
                )
            )
        self.valid = layer + 1

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

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.trainer.world_size if self._trainer is not None else 1

    @torch.inference_mode()
    def monitor(self, ahead: bool = False) -> tuple[float, float]:
        """(loss, KL(teacher ‖ student)) of the student as it is, nats a token, on the monitored windows.

        Args:
            ahead: a pass over the student as it is follows, of what `needs` says: its first batches are these, and are
                measured now, while they run.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for index, teacher_final in self._teacher_final.items():
            batch = self.batches[index]
            if ahead and self.needs:
                hidden = self._measure(index)
                self._ahead.add(index)
            else:
                hidden = self._forward(index, self.start)
            losses, divergence = losses_and_divergences(
                self.student, hidden, self.teacher, teacher_final, batch["input_ids"], batch["mask"]
            )
            sums += torch.stack(
                [
                    losses.sum(dtype=torch.float64),
                    targets_of(batch["mask"]).sum().double(),
                    divergence.sum(dtype=torch.float64),
                    batch["mask"].sum().double(),
                ]
            )
        sums = self.sum(sums)
        loss, divergence_mean = float(sums[0] / sums[1].clamp(min=1)), float(sums[2] / sums[3].clamp(min=1))
        if not math.isfinite(loss):
            raise NotFinite("the calibration loss is not finite; the model or its dtype overflows on this text")
        return loss, divergence_mean

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {}  # the record is what a run resumes from


def _inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    return batch["input_ids"], batch["attention"]
