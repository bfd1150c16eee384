"""SLEB: drop the layer that the calibration loss misses least, again and again (ICML 2024, arXiv 2402.09025).

    l* = argmin_l NLL(student without layer l),   b ≤ l < n − b       n: layers still there, b: barriers

Defaults of the released code: b = 1, WikiText-2, windows of 2048 tokens. CoMe's copy has b = 0.

A candidate runs from l upward, on the streams kept at every boundary, and is given up once its partial loss is above
the best so far: neither changes a choice; a loss given up is infinite in the scores. So that this happens early, what
the last step could have spared best comes first, and without a step before, what has the fewest layers to run.

Differs from the released code in: the loss is a mean over predicted tokens, padding left out; candidates do not run the
layers below them; drops may be compensated (candidates are judged without that).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from come_pl.pruning.methods.base import Decision, NoSite
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import Drop, rounded
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.record import Record


class SLEB(Drop):
    """Progressive dropping by loss.

    Args:
        barriers: Layers at either end, of those still there, that are never dropped; 0 as in CoMe's copy.
        windows: Calibration windows that losses are measured on, rounded up to whole batches; all without it.
    """

    needs = frozenset({"streams"})

    def __init__(self, barriers: int = 1, windows: int | None = None, **options: Any):
        super().__init__(**options)
        check(windows=(windows, 1))
        if barriers < 0:
            raise ValueError(f"barriers {barriers}: the number of protected layers at either end is not negative")
        self.barriers, self.pass_windows = barriers, windows

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        if record.layers - remove < 2 * self.barriers:
            raise NoSite(
                f"barriers {self.barriers} protect {2 * self.barriers} layers, more than the {record.layers - remove} "
                "that are to be left; give a smaller --barriers or a larger --target_layers"
            )
        losses = [math.inf] * record.layers
        best = math.inf
        for layer in self.order(record):
            losses[layer] = module.loss(layer, skip=[layer], bound=best, windows=self.pass_windows)
            best = min(best, losses[layer])
        if best == math.inf:
            raise NotFinite("the calibration loss without any layer is not finite; the model overflows in this dtype")
        return self.drop(module, [losses.index(best)], "loss_without", losses)

    def order(self, record: Record) -> list[int]:
        """The student layers that may go, in the order of trying, which no choice depends on."""
        expected: list[float | None] = [None] * record.layers
        if record.steps and "loss_without" in record.steps[-1].scores:
            expected = list(record.steps[-1].scores["loss_without"])
            del expected[record.steps[-1].layers[0]]
        known = [math.inf if loss is None else rounded(loss) for loss in expected]
        return sorted(range(self.barriers, record.layers - self.barriers), key=lambda layer: (known[layer], -layer))
