"""Reverse: drop the last layers first ("Reassessing Layer Pruning in LLMs", arXiv 2411.15558; CoMe's `reverse`).

    order  L−1, L−2, …, 0;   retained layers after all others

Default: no layer is retained.

Differs from the released code in: retained layers go from the last one down, in whatever order they are given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from come_pl.pruning.methods.drops import OneShot
from come_pl.pruning.module import PruningModule


class Reverse(OneShot):
    """Dropping from the end.

    Args:
        retain_layer: Dense layers, from 0, that are dropped only when no other layer is left.
    """

    score_name = "distance_from_top"

    def __init__(self, retain_layer: list[int] | None = None, **options: Any):
        super().__init__(**options)
        self.retain_layer = retain_layer or []

    def score(self, module: PruningModule, statistics: dict[str, Tensor]) -> Iterable[float]:
        return reversed(range(len(module.student)))

    def held_back(self, depth: int) -> Collection[int]:
        wrong = [layer for layer in self.retain_layer if not 0 <= layer < depth]
        if wrong:
            raise ValueError(f"retain_layer {wrong[0]}: the model has layers 0 to {depth - 1}")
        return self.retain_layer
