"""ShortGPT: drop the layers that turn the stream least, all chosen at once (arXiv 2403.03853); `angular`: the block of
layers across which the last token turns least (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
arXiv 2403.17887).

    block influence    BI_l = mean_t 1 − clamp(cos(h_l, h_{l+1}), 0, 1)           the k smallest are dropped
    angular            l*   = argmin_l mean_w arccos(cos(h_l, h_{l+k})) / π       h: last token of window w

Layers l* … l*+k−1 are dropped in one step, k being what is left to remove. Defaults of the released code: BI, PG19.

Differs from the released code in: means over tokens and windows instead of sums; the last layer's output is taken
before the final norm (CoMe's copy: after it); padding is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from come_pl.pruning.batches import inputs_of
from come_pl.pruning.methods.base import Decision
from come_pl.pruning.methods.drops import OneShot, rounded
from come_pl.pruning.module import PruningModule
from come_pl.record import Record
from come_pl.taps import LayerStatistics, boundaries, last_token


def angular_distances(module: PruningModule, block: int) -> list[float]:
    """Mean over windows of the angle, in units of π, between the last token's stream before layer l and `block` layers
    later, for each l; one pass over the calibration windows."""
    statistics = LayerStatistics(len(module.student), block).to(module.device)
    for batch in module.batches:
        rows, last = torch.arange(len(batch["mask"]), device=module.device), last_token(batch["mask"])
        with torch.inference_mode(), boundaries(module.student) as found:
            module.student.run(*inputs_of(batch))
            states = {boundary: stream[rows, last][:, None] for boundary, stream in found.items()}
            statistics.update(states, batch["mask"].any(1, keepdim=True))
    return [rounded(d) for d in statistics.compute()["span_last"].tolist()]


class ShortGPT(OneShot):
    """One-shot dropping by block influence.

    Args:
        angular: Drop instead one block of adjacent layers, that of the least angular distance of the last token.
    """

    needs = frozenset({"block_influence"})
    score_name = "block_influence"

    def __init__(self, angular: bool = False, **options: Any):
        super().__init__(**options)
        self.angular = angular
        self.progressive = not angular

    def needs_for(self, record: Record) -> frozenset[str]:
        return self.always if self.angular else super().needs_for(record)

    def score(self, module: PruningModule, statistics: dict[str, Tensor]) -> Iterable[float]:
        return statistics["block_influence"].tolist()

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        if not self.angular:
            return super().__call__(module, statistics, record, remove=remove)
        distances = angular_distances(module, remove)
        first = distances.index(min(distances))
        return self.drop(module, range(first, first + remove), "angular_distance", distances)
