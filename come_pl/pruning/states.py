"""The streams of the student and of the dense model on the calibration windows, kept from one pass to the next."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning.batches import CalibrationBatches, inputs_of
from come_pl.pruning.inputs import KnownInputs
from come_pl.pruning.streams import Block, Cache, Streams
from come_pl.record import Record, lowest_changed
from come_pl.taps import boundaries, projection_input, stream_at
from come_pl.tensors import Scratch

CHANNELS = 2 * 2**30  # bytes of inputs of down_proj that are kept of a pass


class CalibrationStates(CalibrationBatches):
    """Streams of each batch of `batches` at each boundary, in memory, in files or nowhere.

    Attributes:
        teacher, student: the dense model, and the one that is pruned.
        keeps_dense: the dense model's streams will be asked for when the student is another.
        inputs: of the output projections of the layer that is repaired.
    """

    teacher: Decoder
    student: Decoder
    record: Record
    cache: Cache
    cache_gib: float
    compile_layers: bool
    keeps_dense = False
    pass_windows: int | None

    def hold_streams(self, files: Scratch) -> None:
        """Begin without any stream."""
        self._streams = Streams(self.cache_gib, files)
        self._states: list[Block | None] = []  # of each batch
        self._valid: list[int] = []  # of each: its highest boundary that is the student's as it is
        self._teacher_states: dict[int, Block] = {}  # the same of the teacher, once something asks for them
        self._alone: frozenset[int] | None = None  # see `keep_only`; without it all
        self._teacher_from = 0
        # of a pass that keeps them: (batch, layer) → the input of down_proj (batch, seq, channels)
        self.mlp_channels: dict[tuple[int, int], Tensor] = {}
        # to this boundary the student's streams are the dense model's
        self._shared = min((lowest_changed(step) for step in self.record.steps), default=len(self.teacher))
        # compiled layers run as they are, and a device has computed them sooner than it would get them from the host
        self.inputs = KnownInputs(lambda: self.recomputes_slowly)

    @property
    def in_memory(self) -> bool:
        """Whether what is computed of the windows may be kept in memory, without a budget."""
        return self.cache == "ram" and self.cache_gib == math.inf

    @property
    def recomputes_slowly(self) -> bool:
        """Whether what layers get may be kept, and is had sooner so than computed again."""
        return self.in_memory and not self.compile_layers and self.device.type == "cpu"

    def keep_channels(self, batch_idx: int, layer: int, x: Tensor) -> None:
        """Remember the input of a down_proj of the student, if there is room for it; x: (batch, seq, channels) or
        (batch·seq, channels)."""
        if sum(kept.nbytes for kept in self.mlp_channels.values()) + x.nbytes <= CHANNELS:
            self.mlp_channels[batch_idx, layer] = x.reshape(*self.batches[batch_idx]["input_ids"].shape, -1)

    @property
    def start(self) -> int:
        """The lowest layer that the next pass runs; to there the streams of all batches are the student's as it is."""
        return max(min(self._valid, default=0), 0)

    def _start(self, batch_idx: int) -> int:
        """The lowest layer that a batch has to run."""
        return max(self._known(batch_idx, len(self.student)), 0)

    def _known(self, batch_idx: int, boundary: int) -> int:
        """The highest boundary up to this one at which a batch's stream is kept, and is the student's; −1: none."""
        kept = self._states[batch_idx]
        return -1 if kept is None else kept.up_to(min(boundary, self._valid[batch_idx]))

    def _block(self, decoder: Decoder, batch: dict[str, Any]) -> Block | None:
        """Room for the streams of a batch; None where nothing is kept."""
        if self.cache == "none":
            return None
        shape = (*batch["input_ids"].shape, decoder.geometry.hidden)
        return self._streams.block(len(decoder) + 1, torch.empty(shape, dtype=decoder.model.dtype, device="meta"))

    def _back(self, kept: Block, boundary: int) -> Tensor:
        return kept[boundary].to(self.device, non_blocking=True)

    @torch.inference_mode()
    def stream(self, batch_idx: int, boundary: int) -> Tensor:
        """The student's stream (batch, seq, hidden) before layer `boundary`, of one batch of `batches`."""
        kept, known = self._states[batch_idx], self._known(batch_idx, boundary)
        hidden = None if kept is None or known < 0 else self._back(kept, known)
        if known == boundary and hidden is not None:
            return hidden
        start, hidden = (known, hidden) if known > 0 else (0, None)
        return stream_at(self.student, boundary, *inputs_of(self.batches[batch_idx]), start=start, hidden=hidden)

    def reads(self, batch_idx: int, layer: int, path: str) -> Tensor:
        """What projection `path` of a student layer gets (batch, seq, channels), of one batch."""
        hidden = self.stream(batch_idx, layer)
        with self.inputs.used(self.student, layer, batch_idx, path):
            return projection_input(self.student, layer, path, *inputs_of(self.batches[batch_idx]), hidden)

    @torch.inference_mode()
    def teacher_stream(self, batch_idx: int, boundary: int) -> Tensor:
        """The teacher's stream (batch, seq, hidden) before its layer `boundary`, of one batch of `batches`."""
        if self.cache == "none":
            return stream_at(self.teacher, boundary, *inputs_of(self.batches[batch_idx]))
        own = self._states[batch_idx]
        if own is not None and boundary <= self._shared and self._known(batch_idx, boundary) == boundary:
            return self._back(own, boundary)
        kept = self._teacher_states.get(batch_idx) or self._block(self.teacher, self.batches[batch_idx])
        assert kept is not None
        self._teacher_states[batch_idx] = kept
        if boundary not in kept.held:  # runs no further than is asked for: the next call goes on from there
            inputs, start = inputs_of(self.batches[batch_idx]), max(kept.up_to(boundary), 0)
            hidden = self._back(kept, start) if start else None
            if boundary == 0:
                kept[0] = stream_at(self.teacher, 0, *inputs)
            else:
                first = max(start + 1 if start else 0, self._teacher_from)
                with boundaries(self.teacher, min(first, boundary), kept, boundary):
                    self.teacher.run(*inputs, start=start, hidden=hidden, stop=boundary)
        return self._back(kept, boundary)

    def hand_over(self, lowest: int) -> None:
        """The streams of the student, which is the dense model still, become the teacher's; it keeps those that it will
        have when its layers from `lowest` on are others, as they are going to be."""
        for index, kept in enumerate(self._states):
            if kept is None or self._valid[index] < len(self.teacher) or index in self._teacher_states:
                continue
            self._teacher_states[index] = kept
            own = self._states[index] = self._block(self.student, self.batches[index])
            assert own is not None
            for boundary in range(lowest + 1):
                own[boundary] = kept[boundary]

    def begin_repair(self, layer: int) -> None:
        """The weights of a student layer are going to be others; streams below it stay what they are."""
        self.inputs.begin(layer)
        self._shared = min(self._shared, layer)

    def streams_changed_from(self, lowest: int) -> None:
        """The student is another from layer `lowest` on; −1: its embeddings are others, too."""
        self.inputs.begin(None)
        self._shared = min(self._shared, lowest)
        self._valid = [min(valid, lowest) for valid in self._valid]

    def keep_only(self, wanted: Collection[int], lowest: int) -> None:
        """For a last time through the layers, from `lowest` up: from here on the student's streams are kept where they
        have come to and at these boundaries, the dense model's from there on, no further than they have been asked for;
        what else is asked for is computed."""
        self._alone, self._teacher_from = frozenset(wanted), lowest
        for kept, valid in zip(self._states, self._valid, strict=True):
            if kept is not None:
                lower = {boundary for boundary in self._alone if boundary < valid}
                for boundary in set(kept.held) - lower - {valid}:
                    kept.drop(boundary)

    @torch.inference_mode()
    def reach(self, boundary: int) -> None:
        """Make the student's streams of all windows valid up to a boundary."""
        if self.cache == "none":
            return
        self.pass_windows, first = None, max(min(boundary, self._shared), 0)
        for index, batch in enumerate(self.batches):
            if self._states[index] is None or self._valid[index] < first:
                own = self._shared < 0
                shared = stream_at(self.student, 0, *inputs_of(batch)) if own else self.teacher_stream(index, first)
                store = self._states[index] = self._states[index] or self._block(self.student, batch)
                assert store is not None
                store[first] = shared
                self._valid[index] = first
        for layer in range(self.start, boundary):
            self.advance(layer)

    @torch.inference_mode()
    def advance(self, layer: int) -> None:
        """Run one layer of the student again, so that the stream after it is valid."""
        if self.cache == "none":
            return
        for index, store in enumerate(self._states):
            assert store is not None and self._valid[index] >= layer, "streams are advanced from below"
            inputs, hidden = inputs_of(self.batches[index]), self.stream(index, layer)
            with self.inputs.used(self.student, layer, index):
                store[layer + 1] = stream_at(self.student, layer + 1, *inputs, start=layer, hidden=hidden)
            self._valid[index] = layer + 1
            if self._alone is not None and layer not in self._alone and layer in store.held:
                store.drop(layer)
        if self._alone is not None:
            above = self.record.groups[layer + 1 :]
            for kept in self._teacher_states.values():
                for boundary in set(kept.held).intersection(range(above[0][0] if above else len(self.teacher))):
                    kept.drop(boundary)
        self.inputs.begin(None)
