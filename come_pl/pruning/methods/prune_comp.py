"""Prune&Comp: drop the layer that turns the stream least, make up for its length, measure again (AAAI 2026).

    l* = argmin_l BI_l       of the student as it is, compensated
    α  = mean_t |h_{l*+1}| / mean_t |h_{l*}|;   the stream below l* is multiplied by α, in the weights

Compensation is exact for pre-norm models, up to the norms' epsilon (and, of weights in half precision, a rounding for
each drop); it is in `drops.py`, and every other method that drops layers takes it too (`--compensate magnitude`).
Default: magnitude; none is progressive ShortGPT.

Differs from the released code in: unknown, it was not read; the norm (L2 of each token, mean over tokens) is a reading
of the paper. With tied embeddings the final norm takes 1/α, so that the head stays what it was.
"""

from __future__ import annotations

from torch import Tensor

from come_pl.pruning.methods.base import Decision
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import Compensation, Drop, rounded
from come_pl.pruning.module import PruningModule
from come_pl.record import Record


class PruneComp(Drop):
    """Progressive dropping by block influence, with compensation.

    Args:
        compensate: What follows a drop: none, or magnitude (the stream below the dropped layer is multiplied, in the
            weights, by what the layer multiplied its length by).
        windows: Calibration windows that both are measured on, rounded up to whole batches; all without it. (With
            --refit_when step block influence is of all of them: the repair reads them anyhow.)
    """

    needs = frozenset({"block_influence"})

    def __init__(self, compensate: Compensation = "magnitude", windows: int | None = None):
        super().__init__(compensate)
        check(windows=(windows, 1))
        self.pass_windows = windows

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        influence = [rounded(b) for b in statistics["block_influence"].tolist()]
        return self.drop(module, [influence.index(min(influence))], "block_influence", influence)
