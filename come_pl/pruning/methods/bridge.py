"""A linear map in the place of dropped layers, to judge the drop as a repair in closed form would leave it.

    Δ = argmin_Δ Σ_t w_t ‖T_t − h_t − Δ h_t‖² + λ s ‖Δ‖²,   w_t = 1 / mean_c(T_tc²);      h ← h + Δ h

h is the stream before what is dropped, T the dense model's after it, λ the best of unseen windows. Not from a paper
(the map is that of a dropped block in ReplaceMe, arXiv 2505.02819, of the whole stream). Nothing of it stays in the
model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import token_weights
from come_pl.pruning.regression import NormalEquations

FOLDS = 4


class Bridge(nn.Module):
    """Stands for a layer: h ← h + Δ h."""

    def __init__(self, change: Tensor):
        super().__init__()
        self.change = change

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states + hidden_states @ self.change.T.to(hidden_states.dtype)


def equations(module: PruningModule, parts: Iterable[tuple[dict[str, Any], Tensor, Tensor]]) -> NormalEquations:
    """Sums, over all processes, of the regression of a map.

    Args:
        parts: (batch, h, T), the last two (windows, seq, hidden).
    """
    width = module.student.geometry.hidden
    found = NormalEquations(width, width, FOLDS, False, module.device)
    for batch, hidden, target in parts:
        hidden, target = hidden.float(), target.float()
        found.add_windows(batch, hidden, target - hidden, token_weights(target, batch["mask"], "inverse"))
    return found.summed(module.sum)
