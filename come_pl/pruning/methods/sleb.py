"""SLEB: drop the layer that the calibration loss misses least, again and again (ICML 2024, arXiv 2402.09025).

    l* = argmin_l NLL(student without layer l),   b ≤ l < n − b       n: layers still there, b: barriers

Defaults of the released code: b = 1, WikiText-2, windows of 2048 tokens. CoMe's copy has b = 0.

A candidate runs from l upward, on the streams kept at every boundary, and is given up once its partial loss is above
the best so far: neither changes a choice; a loss given up is infinite in the scores. So that this happens early, what
the last step could have spared best comes first, and without a step before, what has the fewest layers to run. `race`
runs candidates side by side and gives one up as soon as it is clearly above the best of the same tokens
(`come_pl/pruning/race.py`); the losses in the scores are then the winner's, and that plus the mean difference to it.

`bridge` judges a candidate as a repair in closed form would leave it: in the layer's place stands the linear map that
leads the student's stream best to the teacher's after what is dropped, solved on windows of its own:

    Δ_l = argmin_Δ Σ_t w_t ‖T_t − h_t − Δ h_t‖² + λ s ‖Δ‖²;      loss of the student with h ← h + Δ_l h for layer l

The map is only for judging; nothing of it stays in the model. Not from a paper (the map is that of a dropped block in
ReplaceMe, arXiv 2505.02819, of the whole stream).

Differs from the released code in: the loss is a mean over predicted tokens, padding left out; candidates do not run the
layers below them; drops may be compensated (candidates are judged without that).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from come_pl.decoder import Family
from come_pl.pruning.methods.base import Decision, NoSite
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import Drop, rounded
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.pruning.regression import NormalEquations, token_weights
from come_pl.record import Record


class Bridge(nn.Module):
    """Stands for a layer: h ← h + Δ h."""

    def __init__(self, change: Tensor):
        super().__init__()
        self.change = change

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states + hidden_states @ self.change.T.to(hidden_states.dtype)


class SLEB(Drop):
    """Progressive dropping by loss.

    Args:
        barriers: Layers at either end, of those still there, that are never dropped; 0 as in CoMe's copy.
        windows: Calibration windows that losses are measured on, rounded up to whole batches; all without it.
        bridge: Judge each candidate with a linear map in its place, solved on so many windows after those; 0: with
            nothing in its place, as published. For runs with --refit. Needs `windows`.
        race: Stop measuring a candidate that is clearly worse than the best after a part of the text; the same choice
            unless chance is against it.
    """

    needs = frozenset({"streams"})

    def __init__(
        self, barriers: int = 1, windows: int | None = None, bridge: int = 0, race: bool = False, **options: Any
    ):
        super().__init__(**options)
        check(windows=(windows, 1), bridge=(bridge, 0))
        if bridge and windows is None:
            raise ValueError(f"bridge {bridge}: its windows follow those that losses are measured on; give --windows")
        if barriers < 0:
            raise ValueError(f"barriers {barriers}: the number of protected layers at either end is not negative")
        self.barriers, self.windows, self.bridge, self.race = barriers, windows, bridge, race
        self.pass_windows = None if windows is None else windows + bridge
        self.spares_teacher = not bridge
        self.score_name = "loss_bridged" if bridge else "loss_without"

    def check(self, family: Family, layers: int, remove: int) -> None:
        if layers - remove < 2 * self.barriers:
            raise NoSite(
                f"barriers {self.barriers} protect {2 * self.barriers} layers, more than the {layers - remove} "
                "that are to be left; give a smaller --barriers or a larger --target_layers"
            )

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        self.check(module.student.family, record.layers, remove)
        losses = [math.inf] * record.layers
        if self.race:
            race = module.race(functools.cache(lambda layer: self.instead(module, record, layer)), self.windows)
            winner = race.best(self.order(record))
            for layer, above in race.above.items():
                losses[layer] = race.mean(winner) + above
        else:
            for layer in self.order(record):
                instead = self.instead(module, record, layer)
                losses[layer] = module.loss(**instead, bound=min(losses), windows=self.windows)
        if min(losses) == math.inf:
            raise NotFinite("the calibration loss without any layer is not finite; the model overflows in this dtype")
        return self.drop(module, [losses.index(min(losses))], self.score_name, losses)

    def instead(self, module: PruningModule, record: Record, layer: int) -> dict[str, Any]:
        """What a candidate's loss is measured with: for `PruningModule.loss`."""
        fit = self.equations(module, record, layer).solve() if self.bridge else None
        return {"start": layer} | ({"skip": [layer]} if fit is None else {"swap": {layer: Bridge(fit.change)}})

    @torch.inference_mode()
    def equations(self, module: PruningModule, record: Record, layer: int) -> NormalEquations:
        """Sums, over all processes, of the regression of what the stream before a student layer lacks on itself."""
        end, width = record.groups[layer][-1] + 1, module.student.geometry.hidden
        found, seen = NormalEquations(width, width, 4, False, module.device), module.first_batches(self.windows)
        numbers = module.first_batches(self.pass_windows)[len(seen) :]
        if not numbers:
            raise NoSite(
                f"bridge {self.bridge}: no batch of calibration windows is left after those of --windows "
                f"{self.windows}; give more --data.tokens, or a smaller --data.batch_size"
            )
        for number in numbers:
            batch, hidden = module.batches[number], module.stream(number, layer).float()
            target = module.teacher_stream(number, end).float() * record.scale_at(end)
            found.add_windows(batch, hidden, target - hidden, token_weights(target, batch["mask"], "inverse"))
        return found.summed(module.add_up)

    def order(self, record: Record) -> list[int]:
        """The student layers that may go, in the order of trying, which no choice depends on."""
        expected: list[float | None] = [None] * record.layers
        if record.steps and self.score_name in record.steps[-1].scores:
            expected = list(record.steps[-1].scores[self.score_name])
            del expected[record.steps[-1].layers[0]]
        known = [math.inf if loss is None else rounded(loss) for loss in expected]
        return sorted(range(self.barriers, record.layers - self.barriers), key=lambda layer: (known[layer], -layer))
