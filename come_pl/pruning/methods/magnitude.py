"""Magnitude, and magnitude+: drop the layers with the smallest weights, all chosen at once (Shortened LLaMA,
arXiv 2402.02834).

    row       s_o = Σ_i |W_oi|^p           of every weight of the layer; a norm's weights are rows of one
    weight    s_W = reduce_o s_o           `weight_reduction`
    layer     s_l = reduce_W s_W           `block_reduction`; the smallest are dropped

"+": layers 0, 1, 2, 3, L−2 and L−1 are held back. Defaults of the released code: p = 1, sum, sum; biases do not count.
With a product anywhere scores are natural logarithms, which have the same order and stay in range.

Differs from the released code in: products are taken of logarithms (there, they overflow); held-back layers are dropped
when no other is left (there, never; CoMe's copy does as here); no gradient is computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from come_pl.offload import present
from come_pl.pruning.methods.drops import OneShot
from come_pl.pruning.module import PruningModule

Reduction = Literal["sum", "mean", "max", "prod"]


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """What counts of a decoder layer: matrices and norms' weights, not biases."""
    return [parameter for name, parameter in layer.named_parameters() if name.endswith("weight")]


def reduced(logarithms: Tensor, how: Reduction) -> Tensor:
    """Logarithm of the sum, mean, maximum or product of numbers (n,) given by their logarithms."""
    if how == "max":
        return logarithms.max()
    if how == "prod":
        return logarithms.sum()
    return logarithms.logsumexp(0) - (math.log(len(logarithms)) if how == "mean" else 0.0)


class Magnitude(OneShot):
    """One-shot dropping by the size of weights.

    Args:
        norm_power: Exponent on each weight's magnitude (taylor: times its gradient's).
        weight_reduction: How the rows of a weight are joined: sum, mean, max or prod.
        block_reduction: How the weights of a layer are joined: sum, mean, max or prod.
        heuristic: Hold the first four layers and the last two back until no other layer is left.
    """

    score_name = "magnitude"

    def __init__(
        self,
        norm_power: float = 1.0,
        weight_reduction: Reduction = "sum",
        block_reduction: Reduction = "sum",
        heuristic: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        if not 0 < norm_power < math.inf:
            raise ValueError(f"norm_power {norm_power}: the exponent on each weight is positive")
        self.norm_power, self.heuristic = norm_power, heuristic
        self.weight_reduction, self.block_reduction = weight_reduction, block_reduction

    def held_back(self, depth: int) -> Collection[int]:
        return {0, 1, 2, 3, depth - 2, depth - 1} if self.heuristic else ()

    def salience(self, module: PruningModule) -> Iterator[tuple[int, list[Tensor]]]:
        """(layer, what is scored of each of its weights, in their shapes), layers in any order."""
        for index, layer in enumerate(module.student.layers):
            with present(layer):
                yield index, [weight.detach() for weight in weights_of(layer)]

    def score(self, module: PruningModule, statistics: dict[str, Tensor]) -> Iterable[float]:
        scores = {index: self.joined(tensors) for index, tensors in self.salience(module)}
        return [scores[index] for index in sorted(scores)]

    def joined(self, tensors: Iterable[Tensor]) -> float:
        """One score of a layer's weights."""
        rows = [t.float().abs().pow(self.norm_power).reshape(len(t), -1).sum(1, dtype=torch.float64) for t in tensors]
        smallest = torch.finfo(torch.float64).tiny  # a row of zeros has no logarithm
        joined = [reduced(row.clamp(min=smallest).log(), self.weight_reduction) for row in rows]
        score = reduced(torch.stack(joined), self.block_reduction)
        return float(score if "prod" in (self.weight_reduction, self.block_reduction) else score.exp())


class MagnitudePlus(Magnitude):
    """Magnitude with the first four layers and the last two held back."""

    def __init__(self, heuristic: bool = True, **options: Any):
        super().__init__(heuristic=heuristic, **options)
