"""The LightningModule of pruning: a teacher, a student that shares its untouched layers, and what is read off them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from come_pl import record as records
from come_pl.decoder import Decoder, attention_mask
from come_pl.offload import Offload, Store, aside, matrices, take_back
from come_pl.pruning.batches import inputs_of
from come_pl.pruning.race import ERRORS, Look, Race
from come_pl.pruning.sites import SiteRace
from come_pl.pruning.states import CalibrationStates
from come_pl.pruning.streams import Cache, FileBlock
from come_pl.record import Record, Step
from come_pl.surgery import share
from come_pl.taps import (
    LayerStatistics,
    boundaries,
    losses_and_divergences,
    projection_inputs,
    targets_of,
    token_losses,
)
from come_pl.tensors import Scratch


class NotFinite(ValueError):
    """Calibration gave NaN or infinity."""


class PruningModule(CalibrationStates):
    """Holds the dense model (teacher) and the model being pruned (student), and collects statistics of the student.

    One epoch is one pass over the calibration windows. After a step only the layers from the lowest changed one upward
    run again, from the states kept at every boundary.

    Args:
        path: Dense model: `embedded` (SmolLM2-135M-Instruct), a hub id, a folder, a .gguf file, or package:NAME.
        dtype: auto (the checkpoint's own on an accelerator, float32 on a CPU), float32, bfloat16 or float16.
        offload: Where the decoder layers' matrices are while they are not used: none (in memory), disk (read from the
            checkpoint's safetensors files, one matrix at a time; a pass reads them once a batch), or cpu (host memory,
            given to the accelerator one matrix at a time; without one the same as none). The result is the same with
            the same --refit_last, which is 1 by default here.
        cache: Where the streams between layers are kept for the next pass: ram, disk, or none (every pass runs all
            layers). The result is the same.
        cache_gib: Memory for the streams, of the dense model's and the pruned one's together, in GiB; batches beyond
            it are kept on disk. Without it, all are in memory. For cache ram.
        compile: Run decoder layers through torch.compile wherever nothing is read off inside of them. The first pass
            waits for the compiler; results may differ in their last digits.
        monitor: Number of calibration windows on which loss and KL(teacher || student) are measured after each step,
            but for those on the way to a repair at the end that no pass follows; of several processes each has the
            same share, rounded up.
    """

    def __init__(
        self,
        path: str = "embedded",
        dtype: str = "auto",
        cache: Cache = "ram",
        monitor: int = 4,
        offload: Offload = "none",
        cache_gib: float | None = None,
        compile: bool = False,
    ):
        super().__init__()
        if monitor < 1:
            raise ValueError(f"monitor {monitor}: at least 1 window is measured after each step")
        if cache_gib is not None and (cache != "ram" or not cache_gib >= 0):
            raise ValueError(f"cache_gib {cache_gib}: a budget of memory, not negative, and for --cache ram")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.path, self.dtype_name, self.cache, self.monitor_windows = path, dtype, cache, monitor
        self.compile_layers = compile
        self.products: torch.dtype | None = None  # see `Decoder`
        self.offload: Offload = offload
        self.cache_gib = 0.0 if cache == "disk" else math.inf if cache_gib is None else cache_gib
        self.needs: frozenset[str] = frozenset()
        self.pass_windows: int | None = None  # windows that the next passes run on; all without it
        self.channel_windows = 0  # windows that they keep `mlp_channels` of
        self.span = 2

    def configure_optimizers(self) -> None:
        return None

    def attach(
        self, model: Any, record: Record, *, needs: Collection[str], span: int = 2, scratch: Path | None = None
    ) -> None:
        """Give the module its dense model, the record to go on from, and what its method needs measured.

        Args:
            scratch: folder for what is on disk; emptied. By default a temporary one.
        """
        files = Scratch(scratch)
        self.teacher_model, self.record = model.requires_grad_(False), record
        self.student_model = records.replay(record, model) if record.steps else share(model)
        self.teacher, self.student = (
            Decoder(m, self.compile_layers, self.products) for m in (self.teacher_model, self.student_model)
        )
        self.needs, self.span = frozenset(needs), span
        self.hold()
        self._store, self._retired = Store(files), list[nn.Parameter]()  # of dense layers that nobody needs
        self.hold_streams(files)
        self.sites = SiteRace()
        self._teacher_final: dict[int, Tensor] = {}
        self._ahead: set[int] = set()  # batches that the next pass need not run: monitoring measured them
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
        # Lightning's autocast is for everything; here it is for the layers alone
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            if len(self.batches) <= batch_idx:
                # asked once: `all()` waits for the device
                self.batches.append(batch | {"attention": attention_mask(batch["mask"])})
                self._states.append(None)
                self._valid.append(0)
            final = None
            # not for a method that looks at weights only
            wanted = bool(self.needs) and (
                self.pass_windows is None or batch_idx in self.first_batches(self.pass_windows)
            )
            monitored = (
                None if batch_idx in self._teacher_final else self.monitored(self.monitor_windows).get(batch_idx)
            )
            if wanted and batch_idx not in self._ahead:
                # the first batch tells what the others may leave out
                whole = batch_idx == 0 or monitored is not None
                final = self._measure(batch_idx, None if whole else self.sites.stop)
            if wanted:
                self.sites.narrow([batch["mask"] for batch in self.batches[: batch_idx + 1]])
            if monitored is not None:
                if final is None or self.record.steps:
                    final = self.teacher.run(*inputs_of(self.part((batch_idx, monitored))))
                # else the student is the dense model still
                self._teacher_final[batch_idx] = final[: monitored.stop]

    def _measure(self, batch_idx: int, stop: int | None = None) -> Tensor | None:
        """One batch of a pass, through the layers below `stop`, by default all; its final hidden states (batch, seq,
        hidden), or nothing where no layer has to run."""
        batch, start = self.batches[batch_idx], self._start(batch_idx)
        if stop is not None and start >= stop:
            return None
        stop, mask = len(self.student) if stop is None else stop, batch["mask"]
        kept = self._states[batch_idx] = self._states[batch_idx] or self._block(self.student, batch)
        into = kept if isinstance(kept, FileBlock) else None

        def seen(kind: str, layer: int, x: Tensor) -> None:
            self.statistics.add_channels(kind, layer, x, mask)

        def keep(kind: str, layer: int, x: Tensor) -> None:
            if kind == "mlp":
                self.keep_channels(batch_idx, layer, x)

        with contextlib.ExitStack() as hooks:
            found = hooks.enter_context(boundaries(self.student, start, into, stop))
            if "channel_intensity" in self.needs:
                hooks.enter_context(projection_inputs(self.student, start, seen))
            spacious = self.recomputes_slowly and self.offload == "none"  # else memory comes first
            if spacious and batch_idx in self.first_batches(self.channel_windows):
                hooks.enter_context(projection_inputs(self.student, start, keep))
            final = self._forward((batch_idx, slice(None)), start, stop=stop)
        if kept is not None and into is None:
            # the embeddings change too when the stream is scaled
            for boundary in range(start + 1 if start else 0, stop + 1):
                kept[boundary] = found[boundary]
            lowest = max(start + 1 - self.span, 0)  # where a span that ends above `start` begins
            found |= {b: self.stream(batch_idx, b) for b in range(lowest, start)}
        if self.needs - {"streams"}:
            self.statistics.update(found, mask, start, stop, functools.partial(self.sites.seen, batch_idx))
        if kept is not None:
            self._valid[batch_idx] = stop
        return final

    def _forward(self, look: Look, start: int, **arrangement: Any) -> Tensor:
        kept = self._states[look[0]]
        if kept is None:
            start = 0
        hidden = kept[start][look[1]] if kept is not None and start else None
        return self.student.run(*inputs_of(self.part(look)), start=start, hidden=hidden, **arrangement)

    # -- what methods may ask for -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def loss(
        self,
        start: int = 0,
        *,
        skip: Collection[int] = (),
        swap: Mapping[int, nn.Module] | None = None,
        bound: float = math.inf,
        windows: int | None = None,
    ) -> float:
        """Calibration loss (nats a token) of the student with layers skipped or swapped.

        Args:
            start: lowest layer that differs from the student; layers below are not run.
            bound: a loss already found; infinity is returned for one above it, as soon as that is sure, and for one
                that is not a number. One that equals it is returned: which of equals wins is the caller's to say.
            windows: only the first so many of all processes, rounded up to whole batches.
        """
        targets = self.targets(windows)
        # (nats, processes that gave up), on the device: only a bound makes the host wait for each batch
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index in self.first_batches(windows):
            total[0] += self._losses((index, slice(None)), start, skip=skip, swap=swap).sum(dtype=torch.float64)
            # a quotient, as what is returned: bound * targets may round to below the sum that made the bound
            if bound < math.inf and float(total[0]) / targets > bound:
                total[1] = 1  # this process alone is above the bound, so the sum is
                break
        nats, gave_up = self.sum(total).tolist()
        return nats / targets if not gave_up and nats / targets <= bound else math.inf  # nor if it is not a number

    def race(self, candidate: Callable[[int], dict[str, Any]], windows: int | None = None, close: float = 0.0) -> Race:
        """A race of candidates for the least calibration loss.

        Args:
            candidate: its number → how it differs from the student: `start`, `skip`, `swap` of `loss`.
            windows: as for `loss`.
            close: nats a token that the winner may be above the best.
        """

        @torch.inference_mode()
        def measure(number: int, look: Look) -> Tensor:
            return self._losses(look, **candidate(number))

        def counted(look: Look) -> Tensor:
            return targets_of(self.part(look)["mask"])

        return Race(measure, list(self.looks(windows)), counted, self.sum, ERRORS, close)

    def _losses(self, look: Look, start: int, **arrangement: Any) -> Tensor:
        batch = self.part(look)
        hidden = self._forward(look, start, **arrangement)
        return token_losses(self.student, hidden, batch["input_ids"], batch["mask"])

    # -- steps ------------------------------------------------------------------------------------------------------

    def do(self, step: Step, layer: nn.Module | None = None) -> None:
        """Apply a step to the student; the next pass starts at the lowest changed layer."""
        lowest = records.lowest_changed(step)
        if self.keeps_dense and not self.record.steps:
            self.hand_over(lowest)
        records.apply(step, self.student, layer)
        self.changed_from(lowest)

    def retire(self) -> None:
        """Write the matrices of dense layers that the student has no more to files, and let go of them. Until `recall`
        the dense model does not run."""
        shared = {id(p) for p in self.student_model.parameters()}
        for layer in self.teacher.layers:
            gone = [p for p in matrices(layer) if id(p) not in shared and not hasattr(p, "stored")]
            if gone and len(gone) == len(matrices(layer)):
                for parameter in gone:
                    self._store.put(parameter)
                self._retired += gone

    def recall(self) -> None:
        """Make the dense model whole again."""
        for parameter in self._retired:
            take_back(parameter)
        self._retired.clear()

    def changed_from(self, lowest: int) -> None:
        """The next pass starts at layer `lowest`, or lower where the one before stopped lower: the student is another
        from there on."""
        lowest = -1 if self.cache == "none" else lowest
        self._ahead.clear()
        self.streams_changed_from(lowest)
        self.sites.forget(max(lowest, 0))
        self.statistics = self.statistics.carry(len(self.student), max(lowest, 0))

    @torch.inference_mode()
    def monitor(self, ahead: bool = False) -> tuple[float, float]:
        """(loss, KL(teacher ‖ student)) of the student as it is, nats a token, on the monitored windows.

        Args:
            ahead: a pass over the student as it is follows, of what `needs` says: its first batches are these, and are
                measured now, while they run.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for look in self.monitored(self.monitor_windows).items():
            index, rows = look
            batch = self.part(look)
            if ahead and self.needs and index in self.first_batches(self.pass_windows):
                whole = self._measure(index)
                assert whole is not None, "nothing is left out"
                hidden = whole[rows]
                self._ahead.add(index)
            else:
                hidden = self._forward(look, self._start(index))
            losses, divergence = losses_and_divergences(
                self.student, hidden, self.teacher, self._teacher_final[index], batch["input_ids"], batch["mask"]
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with aside(self):
            return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {}  # the record is what a run resumes from
