"""Distillation methods by name."""

from __future__ import annotations

from come_pl.distillation.comparisons import KD, LM, Hybrid, LoRA
from come_pl.distillation.layerwise import CoMeMP, CoMeSP
from come_pl.distillation.module import DistillationModule

METHODS: dict[str, type[DistillationModule]] = {
    "mp": CoMeMP,
    "sp": CoMeSP,
    "kd": KD,
    "lora": LoRA,
    "lm": LM,
    "hybrid": Hybrid,
}

DEFAULT = "hybrid"  # what measured best


class UnknownMethod(ValueError):
    """No distillation method of that name."""


def find(name: str) -> type[DistillationModule]:
    if name not in METHODS:
        raise UnknownMethod(f"--distill {name!r} is not known; expected one of {', '.join(METHODS)}")
    return METHODS[name]
