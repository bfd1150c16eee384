"""CoMe-P: CoMe with the merge ratio found by search (arXiv 2510.15304).

    l*  = argmin_l arccos(cos(h_l, h_{l+2})) / π     (all tokens)
    r*  = argmin_{r ∈ {0, 1/g, …, 1}} calibration loss of the student with concatenate(l*, l*+1; r, 1 − r)

Pairs only; g = 20. A candidate is one new layer and a run from l* upward; one whose partial loss is already above the
best is given up, which changes no choice.

Differs from the released code in: it runs (there the ratio is used before it is set); the whole model is not copied
for each candidate; and what CoMe's own file lists.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from come_pl.pruning.methods.base import Decision
from come_pl.pruning.methods.come import CoMe, keep
from come_pl.record import Record
from come_pl.surgery import Norm, concatenate, dominant

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule


class CoMeP(CoMe):
    """CoMe with posterior search over the merge ratio.

    Args:
        granularity: Number of intervals of the ratio grid.
        norm: Norms of a new layer: mean (released code), dominant, or fold (each kept channel sees its own layer's).
        wo_repeat: Forbid merging an already merged layer again; by default it is done only when no other site is left.
        skip_method: How the site is chosen: bi (span distance), sleb (least loss with the layers removed), mka (always
            the last layers).
        span_tokens: Tokens that the span distance is taken over: last (of each window) or all.
    """

    def __init__(
        self,
        granularity: int = 20,
        norm: Norm = "mean",
        wo_repeat: bool | None = None,
        skip_method: Literal["bi", "sleb", "mka"] = "bi",
        span_tokens: Literal["last", "all"] = "all",
    ):
        if granularity < 1:
            raise ValueError(f"granularity {granularity}: at least 1 interval")
        super().__init__(rho=0.0, norm=norm, wo_repeat=wo_repeat, skip_method=skip_method, span_tokens=span_tokens)
        self.granularity = granularity

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        step = super().__call__(module, statistics, record, remove=remove).step
        first = step.layers[0]
        layers = [module.student.layers[i] for i in step.layers]
        best, losses = Decision(step), []
        bound = math.inf
        for tick in range(self.granularity + 1):
            ratio = [tick / self.granularity, 1 - tick / self.granularity]
            kept = keep(module.student, step.layers, ratio, statistics)
            candidate = concatenate(module.student, layers, kept, ratio, self.norm)
            # it runs in the place of the layer whose config entries (sliding window, rotary table) it will have
            place = step.layers[dominant(ratio)]
            skip = [i for i in step.layers if i != place]
            loss = module.loss(first, swap={place: candidate}, skip=skip, bound=bound)
            losses.append(loss)
            if loss < bound:
                bound, step.ratio, step.kept, best.layer = loss, ratio, kept, candidate
        step.scores["ratio_loss"] = list(losses)
        return best
