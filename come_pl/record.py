"""What was done to a model, step by step, and what made it.

A `Step` says everything needed to do it again: `replay(record, dense)` rebuilds the pruned model. A `Record` is written
after every step, as JSON lines, beside the old file and then renamed over it, so that a killed run leaves a whole one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from come_pl import surgery, tensors
from come_pl.decoder import Decoder
from come_pl.offload import present
from come_pl.surgery import Kept
from come_pl.tensors import TensorFile, TensorFileError

if sys.platform == "win32":
    import psutil
else:
    import resource


class RecordError(ValueError):
    """A record that cannot be read or does not fit the model."""


@dataclass
class Step:
    """One edit of the student.

    Attributes:
        kind: `drop` a layer, `merge` adjacent layers into one by concatenation, or `blend` them into one by a weighted
            sum of their weights.
        layers: student indices before the step.
        ratio: share of each merged layer, coefficient of each blended one; None for a drop.
        kept: what a merge keeps of each layer.
        norm: how a merge or a blend treats norms, see `surgery.concatenate` and `surgery.blend`.
        scale: what the stream below the step is multiplied by (`surgery.scale_stream`); None for nothing.
        weights: parameters that the step sets after its edit, by "index.path" (student index after the step); kept in
            a safetensors file of its own, and read from there once they are written.
        scores: what the decision was made from, one list a score.
        step: its number, from 1.
        groups: for each student layer after the step, the teacher layers that it stands for.
        loss: calibration loss after the step, nats a token, on the monitored windows; None where it was not measured.
        kl: KL(teacher ‖ student) there, nats a token.
        seconds: from the start of the step's calibration pass to the end of its surgery.
        peak_gib: peak memory of the process (or the CUDA device) in that time.
    """

    kind: Literal["drop", "merge", "blend"]
    layers: list[int]
    ratio: list[float] | None = None
    kept: list[Kept] | None = None
    norm: surgery.Norm | surgery.BlendNorm | None = None
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    step: int = 0
    groups: list[list[int]] = field(default_factory=list)
    loss: float | None = None
    kl: float | None = None
    seconds: float = 0.0
    peak_gib: float = 0.0
    scale: float | None = None
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def weights_file(self) -> str | None:
        """Where the weights are, beside the record."""
        return f"weights/{self.step:03d}.safetensors" if self.weights else None

    @property
    def drops(self) -> bool:
        """Whether nothing of some layer is kept: a drop, or a merge that keeps one layer whole."""
        return self.kind == "drop" or (self.kind == "merge" and 0.0 in (self.ratio or []))

    @property
    def layers_with_weights(self) -> list[int]:
        """Student layers after the step that it gives weights of their own."""
        owners = {name.partition(".")[0] for name in self.weights or {}}
        return sorted(int(owner) for owner in owners - {surgery.FINAL_NORM})

    def to_json(self) -> str:
        entry = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.kept is not None:
            entry["kept"] = [{"kv_heads": list(k.kv_heads), "neurons": _to_hex(k.neurons)} for k in self.kept]
        entry["scores"] = {name: [_tidy(v) for v in values] for name, values in self.scores.items()}
        entry |= {name: _tidy(entry[name]) for name in ("loss", "kl")}
        entry |= {name: round(entry[name], 4) for name in ("seconds", "peak_gib")}
        entry["weights"] = self.weights_file
        order = ["step", "kind", "layers", "ratio", "loss", "kl", "seconds", "peak_gib", "groups", "norm"]
        order += [name for name in ("scale", "weights") if entry[name] is not None]
        return json.dumps({k: entry[k] for k in [*order, "scores", "kept"]}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str, folder: Path | None = None) -> Step:
        """`folder` is the record's; weights are read from there."""
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("not an object")
        if entry.get("weights") is not None:
            try:
                entry["weights"] = TensorFile((folder or Path()) / entry["weights"])
            except TensorFileError as error:
                raise ValueError(f"its weights {entry['weights']!r} cannot be read: {error}") from None
        if entry.get("kept") is not None:
            entry["kept"] = [Kept(tuple(k["kv_heads"]), _from_hex(k["neurons"])) for k in entry["kept"]]
        step = cls(**entry)
        if step.kind not in ("drop", "merge", "blend"):
            raise ValueError(f"kind {step.kind!r}")
        if step.kind == "merge" and None in (step.ratio, step.kept, step.norm):
            raise ValueError("a merge without ratio, kept or norm")
        if step.kind == "blend" and None in (step.ratio, step.norm):
            raise ValueError("a blend without ratio or norm")
        return step


def _to_hex(indices: Sequence[int]) -> str:
    """Bit i of the number is set where neuron i is kept: a quarter of a character a neuron."""
    mask = 0
    for index in indices:
        mask |= 1 << index
    return format(mask, "x")


def _from_hex(mask: str) -> tuple[int, ...]:
    bits = format(int(mask, 16), "b")[::-1]
    return tuple(i for i, bit in enumerate(bits) if bit == "1")


def _tidy(value: float | None) -> float | None:
    """Eight significant digits: rounding of sums over processes must not show."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.8g}")


class Record:
    """The steps of a run and its file.

    Args:
        teacher_layers: depth of the dense model.
        path: `record.jsonl`; None keeps the record in memory only.
    """

    def __init__(self, teacher_layers: int, path: Path | None = None):
        self.teacher_layers, self.path = teacher_layers, path
        self.steps: list[Step] = []
        self._written = 0  # steps whose weights are on disk

    @property
    def groups(self) -> list[list[int]]:
        """For each student layer, the teacher layers that it stands for."""
        return self.steps[-1].groups if self.steps else [[i] for i in range(self.teacher_layers)]

    @property
    def layers(self) -> int:
        return len(self.groups)

    @property
    def sources(self) -> list[int | None]:
        """For each student layer, the teacher layer that it was before any repair; None where layers were mixed."""
        found: list[int | None] = list(range(self.teacher_layers))
        for step in self.steps:
            first, last = step.layers[0], step.layers[-1]
            whole = step.ratio is not None and step.kind == "merge" and 1.0 in step.ratio
            kept = [found[first + (step.ratio or []).index(1.0)]] if whole else [None]
            found[first : last + 1] = [] if step.kind == "drop" else kept
        return found

    def scale_at(self, boundary: int) -> float:
        """What the student's stream at a boundary of the teacher was multiplied by: the product over compensated drops
        that begin there or above."""
        factor, groups = 1.0, [[i] for i in range(self.teacher_layers)]
        for step in self.steps:
            if step.scale is not None and groups[step.layers[0]][0] >= boundary:
                factor *= step.scale
            groups = step.groups
        return factor

    @property
    def scales(self) -> list[float] | None:
        """`scale_at` each boundary of the teacher; None where no step scaled the stream."""
        if all(step.scale is None for step in self.steps):
            return None
        return [self.scale_at(boundary) for boundary in range(self.teacher_layers + 1)]

    def append(self, step: Step) -> None:
        """Numbers the step and works out its groups."""
        step.step, step.groups = len(self.steps) + 1, groups_after(self.groups, step)
        self.steps.append(step)

    def write(self) -> None:
        if self.path is None:
            return
        for step in self.steps[self._written :]:  # first the weights, then the line that names them
            if step.weights_file is not None and step.weights is not None:
                file = self.path.parent / step.weights_file
                file.parent.mkdir(exist_ok=True)
                write_atomically(file, partial(tensors.write, tensors=step.weights, present=present))
                step.weights = TensorFile(file)
        self._written = len(self.steps)
        write_atomically(self.path, "".join(step.to_json() + "\n" for step in self.steps))

    @classmethod
    def read(cls, path: Path, teacher_layers: int) -> Record:
        """Raises RecordError: a line that is not a step, or steps that do not follow from each other."""
        record = cls(teacher_layers, path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise RecordError(f"{path} is not a text file; expected the record.jsonl of a run") from None
        for number, line in enumerate(lines, 1):
            try:
                step = Step.from_json(line, path.parent)
            except (ValueError, TypeError, KeyError) as error:
                raise RecordError(f"{path} line {number} is not a step of a record ({error})") from None
            stored, stored_number = step.groups, step.step
            try:
                record.append(step)
            except (IndexError, TypeError, ValueError):
                stored = []
            if step.groups != stored or stored_number != number:
                raise RecordError(
                    f"{path} line {number}: its groups do not follow from the steps before it on a model of "
                    f"{teacher_layers} layers; the record belongs to another model or was edited"
                )
        record._written = len(record.steps)
        return record


def groups_after(groups: Sequence[Sequence[int]], step: Step) -> list[list[int]]:
    """Groups after a step: merged layers' groups join; a dropped layer's joins the layer before it, or the one after
    it if it was the first."""
    after = [list(group) for group in groups]
    first, last = step.layers[0], step.layers[-1]
    if first < 0 or last >= len(after) or list(step.layers) != list(range(first, last + 1)):
        raise ValueError(f"layers {step.layers} are not adjacent layers of {len(after)}")
    if step.kind != "drop" and len(step.layers) < 2:
        raise ValueError(f"a {step.kind} takes at least two layers")
    if step.kind == "drop":
        if len(step.layers) == len(after):
            raise ValueError("a drop must leave a layer")
        first, last = (first - 1, last) if first > 0 else (0, last + 1)
    return [*after[:first], sum(after[first : last + 1], []), *after[last + 1 :]]


def lowest_changed(step: Step) -> int:
    """The lowest student layer that a step changes; −1 for one that changes the embeddings, too."""
    return -1 if step.scale is not None else min([*step.layers, *step.layers_with_weights])


def apply(step: Step, student: Decoder, layer: nn.Module | None = None) -> None:
    """Do a step to a student. `layer` is the merged layer if it is already built."""
    if step.kind == "drop":
        for index in reversed(step.layers):
            surgery.drop(student, index)
    else:
        assert step.ratio is not None and step.norm is not None, "a merge says in which ratio"
        layers = [student.layers[i] for i in step.layers]
        if step.kind == "blend":
            layer, main = layer or surgery.blend(student, layers, step.ratio, step.norm), step.layers[0]  # type: ignore[arg-type]
        else:
            assert step.kept is not None, "a merge says what it keeps"
            layer = layer or surgery.concatenate(student, layers, step.kept, step.ratio, step.norm)  # type: ignore[arg-type]
            main = step.layers[surgery.dominant(step.ratio)]
        surgery.replace_span(student, step.layers[0], len(step.layers), layer, main)
    if step.scale is not None:
        surgery.scale_stream(student, step.layers[0], step.scale)
    if step.weights:
        surgery.set_weights(student, step.weights)


def replay(record: Record, dense: Any) -> Any:
    """The pruned model of a record; shares the untouched layers of `dense`, which stays whole.

    Raises:
        RecordError: the record was made on a model of another depth or shape.
    """
    if len(Decoder(dense)) != record.teacher_layers:
        raise RecordError(f"the record is of a model of {record.teacher_layers} layers, not {len(Decoder(dense))}")
    model = surgery.share(dense)
    student = Decoder(model)
    for step in record.steps:
        try:
            apply(step, student)
        except (IndexError, ValueError) as error:
            raise RecordError(f"step {step.step} of the record does not fit this model: {error}") from error
    return model


def write_atomically(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never half of one. `content` may be what
    writes the file, given where."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        with open(partial, "r+b") as file:  # Windows syncs only what can be written
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """Versions of everything whose change could change a result."""
    names = ["come_pl", "torch", "lightning", "transformers", "datasets", "torchmetrics", "tokenizers", "safetensors"]
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Meter:
    """Seconds and peak GiB since it was made, of the process or, on CUDA, of the device's allocator.

    The kernel's high-water mark is reset where it can be (Linux); elsewhere the peak is that of the whole process so
    far.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device if device is not None and device.type == "cuda" else None
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self.begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    @property
    def peak_gib(self) -> float:
        if self.device is not None:
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 2**20
        except OSError:
            pass
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
