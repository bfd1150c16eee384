"""How fast models read a prompt and write an answer, measured in turns in one process.

Prompt processing is one forward of (batch, prompt) tokens that fills the KV cache and gives the logits of the last one;
generation is `new_tokens` forwards of one token each, greedy, on that cache. The models take turns, and who is first
changes from turn to turn, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.errors import first_line
from come_pl.record import Meter

GRAPHS = 1024  # of one function: every layer of both models, several times over; torch's own limit is 8


class LatencyError(ValueError):
    """Settings that cannot be measured; the message is one line that says what to do."""


@dataclass(frozen=True)
class Load:
    """What a model is given.

    Attributes:
        batch: sequences at once.
        prompt: tokens of each prompt.
        new_tokens: tokens generated after it, for each sequence.
    """

    batch: int = 1
    prompt: int = 512
    new_tokens: int = 64


@dataclass
class Turns:
    """The measurements of one model.

    Attributes:
        prompt: seconds of prompt processing, one entry a turn.
        generation: seconds of generating all new tokens, one entry a turn.
        peak_gib: the weights, and the most that was allocated beside what was there before a turn (on a CPU as the
            process' memory grows: what is reused is not seen, what torch.compile takes is).
    """

    prompt: list[float] = field(default_factory=list)
    generation: list[float] = field(default_factory=list)
    peak_gib: float = 0.0


def take_turns(
    models: Mapping[str, Any],
    load: Load,
    *,
    repeats: int = 7,
    warmup: int = 2,
    compiled: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Turns]:
    """Measure models, all on one device, on the same random tokens.

    Args:
        repeats: turns that count, for each model.
        warmup: turns before, which do not count.
        compiled: run them through torch.compile.

    Raises:
        LatencyError: counts below one, a sequence longer than a model reads, or a model that does not compile, or not
            all of it.
    """
    for name, value in {**vars(load), "repeats": repeats, "warmup": warmup}.items():
        if value < 1:
            raise LatencyError(f"{name} {value}: expected at least 1")
    for model in models.values():
        most = getattr(Decoder(model).config, "max_position_embeddings", None)
        if most is not None and load.prompt + load.new_tokens > most:
            raise LatencyError(
                f"prompt {load.prompt} and new_tokens {load.new_tokens} are more than the {most} positions of the "
                "model; expected fewer together"
            )
    first = next(iter(models.values()))
    vocabulary = first.get_output_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (load.batch, load.prompt), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(first.device)
    callables = {name: torch.compile(model) if compiled else model for name, model in models.items()}
    weights = {
        name: sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30 for name, model in models.items()
    }
    found = {name: Turns() for name in models}
    with _all_compiled() if compiled else contextlib.nullcontext():
        for turn in range(-warmup, repeats):
            progress("warm-up" if turn < 0 else f"turn {turn + 1} of {repeats}")
            for name in list(models) if turn % 2 == 0 else reversed(list(models)):
                meter = Meter(first.device)
                before = meter.peak_gib
                try:
                    reading, writing = _turn(callables[name], tokens, load.new_tokens)
                except Exception as error:
                    if compiled and type(error).__name__.endswith("LimitHit"):  # its module and name differ by version
                        raise LatencyError(
                            f"torch.compile made {GRAPHS} graphs of one function and would run the rest as it is; "
                            "measure without --compile"
                        ) from error
                    if compiled and turn == -warmup:  # no compiler on this machine, a graph that it cannot take
                        why = first_line(error)
                        raise LatencyError(f"torch.compile failed ({why}); measure without --compile") from error
                    raise
                if turn >= 0 or meter.device is None:  # the memory of a process grows once, in the first turn
                    found[name].peak_gib = max(found[name].peak_gib, weights[name] + meter.peak_gib - before)
                if turn >= 0:
                    found[name].prompt.append(reading)
                    found[name].generation.append(writing)
    return found


@contextlib.contextmanager
def _all_compiled() -> Iterator[None]:
    """Within it nothing that was compiled before counts, and a function of too many graphs is an error: by default it
    runs as it is, without a word."""
    import torch._dynamo.config as config

    torch.compiler.reset()
    size, hit = ("recompile", "recompile") if hasattr(config, "recompile_limit") else ("cache_size", "cache")
    limits = {f"{size}_limit": GRAPHS, f"accumulated_{size}_limit": GRAPHS, f"fail_on_{hit}_limit_hit": True}
    with config.patch(limits):
        yield


@torch.inference_mode()
def _turn(model: Any, tokens: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of prompt processing and of generation."""
    begin = _now(tokens.device)
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    read = _now(tokens.device)
    for _ in range(new_tokens):
        following = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return read - begin, _now(tokens.device) - read


def _now(device: torch.device) -> float:
    """The clock, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; their distance is the interquartile range."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "low": low, "high": high}


def summary(turns: Turns, load: Load) -> dict[str, Any]:
    """Seconds, tokens a second and memory of one model."""
    reading, writing = spread(turns.prompt), spread(turns.generation)
    return {
        "prompt_seconds": reading,
        "prompt_tokens_per_second": load.batch * load.prompt / reading["median"],
        "generation_seconds": writing,
        "generation_tokens_per_second": load.batch * load.new_tokens / writing["median"],
        "peak_gib": turns.peak_gib,
        "turns": len(turns.prompt),
    }


def speed_up(dense: Turns, pruned: Turns) -> dict[str, dict[str, float]]:
    """How many times faster the pruned model is: median and quartiles over the turns, dense / pruned of each."""
    pairs = {"prompt": (dense.prompt, pruned.prompt), "generation": (dense.generation, pruned.generation)}
    return {name: spread([a / b for a, b in zip(*both, strict=True)]) for name, both in pairs.items()}


def ideal(dense: Any, pruned: Any) -> dict[str, float]:
    """What could be reached.

    `layers` is L / L', the speed-up if nothing but decoder layers took time; `with_head` counts the output head too, by
    parameters that are multiplied with each token, as generation does; `layers_share` is the decoder layers' share of
    those in the dense model.
    """
    sizes = []
    for model in (dense, pruned):
        layers = Decoder(model).layers
        sizes.append((len(layers), sum(p.numel() for p in layers.parameters())))
    head = dense.get_output_embeddings().weight.numel()
    (depth, parameters), (shallower, fewer) = sizes
    return {
        "layers": depth / shallower,
        "with_head": (parameters + head) / (fewer + head),
        "layers_share": parameters / (parameters + head),
    }
