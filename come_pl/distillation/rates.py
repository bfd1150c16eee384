"""Learning rates: one for each merged layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

PRESETS: dict[str, tuple[float, ...]] = {  # CoMe-mp, arXiv 2510.15304: shallow to deep
    "llama2-7b": (5e-4, 2.5e-4, 1e-4, 7.5e-5, 5e-5, 2.5e-5, 1e-5),
    "qwen3-4b": (5e-4, 2.5e-4, 5e-5, 2.5e-5, 1e-5, 7.5e-6),
}

Rates = float | list[float] | dict[int, float] | str


class BadRate(ValueError):
    """A learning rate that does not fit the model's merged layers."""


def by_depth(values: Sequence[float], count: int) -> list[float]:
    """`count` rates from a list of another length: geometric interpolation over depth rank, ends kept."""
    if len(values) == count or not values:
        return list(values)
    if len(values) == 1 or count == 1:
        return [values[0]] * count
    rates = []
    for rank in range(count):
        place = rank * (len(values) - 1) / (count - 1)
        below = min(int(place), len(values) - 2)
        share = place - below
        rates.append(math.exp((1 - share) * math.log(values[below]) + share * math.log(values[below + 1])))
    return rates


def learning_rates(lr: Rates, layers: Sequence[int]) -> dict[int, float]:
    """Peak learning rate of each layer.

    Args:
        lr: one rate; a list, shallow to deep, interpolated where its length is another; the name of a published list
            (`PRESETS`); or a mapping from student layer to rate.
        layers: student indices of the layers, shallow to deep.

    Raises:
        BadRate: unknown preset, a rate that is not positive, or a mapping that leaves a layer out.
    """
    if isinstance(lr, str):
        if lr not in PRESETS:
            raise BadRate(f"lr {lr!r}: expected a number, a list, a mapping or one of {', '.join(PRESETS)}")
        lr = list(PRESETS[lr])
    if isinstance(lr, Mapping):
        lr = {int(k): v for k, v in lr.items()}
        if lacking := [i for i in layers if i not in lr]:
            raise BadRate(
                f"lr gives no rate for merged layers {lacking}; it names {sorted(lr)}, merged are {[*layers]}"
            )
        rates = {i: float(lr[i]) for i in layers}
    elif isinstance(lr, Sequence):
        if not lr:
            raise BadRate("lr is an empty list; give at least one rate")
        _positive([float(v) for v in lr])
        rates = dict(zip(layers, by_depth([float(v) for v in lr], len(layers))))
    else:
        rates = dict.fromkeys(layers, float(lr))
    _positive(list(rates.values()))
    return rates


def _positive(rates: Sequence[float]) -> None:
    for rate in rates:
        if not (rate > 0 and math.isfinite(rate)):
            raise BadRate(f"lr {rate}: expected a positive number")


def cosine(step: int, total: int, warmup: int, floor: float) -> float:
    """Share of the peak rate at an optimizer step: linear from 1/warmup to 1, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
