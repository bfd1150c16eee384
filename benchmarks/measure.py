"""What the benchmarks share: models and windows, a pruning run, and its seconds, memory and passes.

A model is what `--model.path` takes, or `random:LAYERSxHIDDEN` (a Llama of that depth and width, random, in TinyLlama's
proportions; `random:22x2048` has 1.1 billion parameters), or `random:LAYERSxHIDDENxVOCABULARY`.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from benchmarks import naive
from benchmarks.cost import counted
from come_pl import memory, models
from come_pl.data import CalibrationData
from come_pl.decoder import Decoder, Family, family_of
from come_pl.pruning.loop import ProgressivePruning
from come_pl.pruning.methods.base import Method
from come_pl.pruning.module import PruningModule
from come_pl.pruning.streams import Block
from come_pl.record import Meter, Record, Step
from come_pl.windows import TokenWindows

RANDOM = re.compile(r"random:(\d+)x(\d+)(?:x(\d+))?")
GIB = 2**30


def peak_gib(meter: Meter, record: Record) -> float:
    """Peak of a whole run: each step of ours has begun a meter of its own, which forgets the peak before it."""
    return max([meter.peak_gib, *(step.peak_gib for step in record.steps)])


class BadBenchmark(ValueError):
    """Settings that nothing can be measured with; the message is one line that says what to do."""


def resident_gib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / GIB


def load(name: str, dtype: str) -> Any:
    """A causal LM by name, see above."""
    if not name.startswith("random:"):
        return models.load_model(name, dtype)
    match = RANDOM.fullmatch(name)
    if match is None:
        raise BadBenchmark(f"model {name!r}: expected random:LAYERSxHIDDEN, such as random:22x2048")
    from transformers import AutoModelForCausalLM, LlamaConfig

    layers, hidden = int(match[1]), int(match[2])
    heads = max(hidden // 64, 4)
    if hidden % heads:
        raise BadBenchmark(f"model {name!r}: {hidden} is no multiple of its {heads} heads; take a multiple of 64")
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=heads,
        num_key_value_heads=next(k for k in range(max(heads // 8, 2), 0, -1) if heads % k == 0),
        vocab_size=int(match[3] or 32000),
        max_position_embeddings=4096,
        initializer_range=hidden**-0.5,  # so that every layer changes the stream by a fair share
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=models.resolve_dtype(dtype, False)).eval()
    memory.reuse()  # as for a model that is loaded
    return model


def calibration(name: str, source: str, tokens: int, seqlen: int, batch_size: int = 2) -> CalibrationData:
    """Windows of a text, or of random tokens for a random model."""
    data = CalibrationData(source, tokens=tokens, seqlen=seqlen, batch_size=batch_size)
    if name.startswith("random:"):
        match = RANDOM.fullmatch(name)
        vocabulary = int(match[3] or 32000) if match else 32000
        shape, order = (tokens // seqlen, seqlen), torch.Generator().manual_seed(0)
        ids = torch.randint(3, vocabulary, shape, generator=order)
        data.windows = TokenWindows(ids, torch.ones(shape, dtype=torch.bool), "random tokens")
    else:
        family: Family = family_of(models.load_config(name))
        data.attach(models.load_tokenizer(name), bos=family.needs_bos, seed=0)
    if data.windows is None or not len(data.windows):
        raise BadBenchmark(f"{tokens} tokens make no window of {seqlen}; give more --tokens or a smaller --seqlen")
    return data


def batches(data: CalibrationData) -> list[Tensor]:
    """Token ids (batch, seq) of each batch."""
    return [batch["input_ids"] for batch in data.train_dataloader()]


def prune(method: Method, model: Any, data: CalibrationData, target_layers: int, monitor: int = 1) -> PruningModule:
    """A pruning run without files, on the CPU: the module after its last step."""
    module = PruningModule(monitor=monitor)
    module.attach(model, Record(len(Decoder(model))), needs=method.needs, span=method.span)
    Trainer(
        max_epochs=-1,
        callbacks=[ProgressivePruning(method, target_layers)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        accelerator="cpu",
    ).fit(module, datamodule=data)
    return module


@dataclass
class Measured:
    """One side of a row.

    Attributes:
        seconds: of the work, the model being loaded.
        peak_gib: above the process with its model.
        passes, head_passes: see `cost.Cost`.
        bare: seconds in units of a bare forward of the decoder layers over the same tokens; of statistics only.
        choices: (layers, ratio) of each step.
    """

    seconds: float
    peak_gib: float
    passes: float
    head_passes: float
    bare: float | None = None
    choices: list[tuple[list[int], list[float] | None]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choices(steps: list[Step]) -> list[tuple[list[int], list[float] | None]]:
    """Shares to three digits: where a ratio is computed and not searched, both sides round it in their own way."""
    return [(s.layers, None if s.ratio is None else [round(r, 3) for r in s.ratio]) for s in steps]


def run(method: Method, model: Any, data: CalibrationData, steps: int, monitor: int, *, ours: bool) -> Measured:
    """Some steps of a method, ours or as in `benchmarks.naive`."""
    target = len(Decoder(model)) - steps
    if target < 2:
        raise BadBenchmark(f"{steps} steps leave {max(target, 0)} of {target + steps} layers; give fewer --steps")
    assert data.windows is not None
    ids = batches(data)
    with torch.inference_mode():
        model(input_ids=ids[0][:, :8], use_cache=False)  # libraries set themselves up
    before = resident_gib()
    with counted(model, data.windows.tokens) as cost:
        meter = Meter()
        record = prune(method, model, data, target, monitor).record if ours else naive.prune(method, model, ids, target)
        seconds, peak = meter.seconds, peak_gib(meter, record)
    return Measured(seconds, peak - before, cost.passes, cost.head_passes, choices=choices(record.steps))


def statistics_pass(method: Method, model: Any, data: CalibrationData, repeats: int, *, ours: bool) -> Measured:
    """The pass that all statistics are collected in, by turns with a bare forward; medians."""
    decoder, ids = Decoder(model), batches(data)
    module = PruningModule()

    def ours_once() -> None:
        # no trainer, and the streams of the pass before are written over
        module.attach(model, Record(len(decoder)), needs=method.needs, span=method.span)
        module.batches, module._states, module._valid = windows, states, [0] * len(windows)
        for index, batch in enumerate(windows):
            module.training_step(batch, index)

    def naive_once() -> None:
        naive.statistics(decoder, ids, method.span)

    def bare_once() -> None:
        for input_ids in ids:
            decoder.run(input_ids)

    states: list[Block | None] = [None] * len(ids)
    whole = [torch.ones_like(i, dtype=torch.bool) for i in ids]
    windows: list[dict[str, Any]] = [{"input_ids": i, "mask": m, "attention": None} for i, m in zip(ids, whole)]
    work: Callable[[], None] = ours_once if ours else naive_once
    with torch.inference_mode():
        decoder.run(ids[0][:, :8])
        before = resident_gib()
        with counted(model, sum(i.numel() for i in ids)) as cost:
            meter = Meter()
            work()
            peak = meter.peak_gib
        passes, heads = cost.passes, cost.head_passes
        times = []
        for _ in range(repeats):
            times.append((clock(work), clock(bare_once)))
    return Measured(
        statistics.median(mine for mine, _ in times),
        peak - before,
        passes,
        heads,
        bare=statistics.median(mine / bare for mine, bare in times),
    )


def clock(work: Callable[[], None]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
