"""CoMe's merge site and ratio by what they cost once the new layer is refitted.

    local   (l*, r*) = argmin  Σ_t w_t ‖T_t − out_t − Δ x_t‖² / tokens,   over tokens not fitted to
    loss    (l*, r*) = argmin  calibration loss of the student with the refitted layer, over the best few of `local`

T is the teacher's stream after the group, out and x the candidate's output and the input of its `down_proj`, Δ the
ridge fit to one half of the calibration windows, the error that on the other half (and the other way round). The ratio
runs over a small grid; 0 and 1 keep one layer whole, so a drop is among the candidates.

Candidates are the `sites` with the least span distance times the grid. The cost of a step beyond CoMe's own, in passes
over the calibration windows of a model with L layers: sites · ratios / L of a layer each for `local` (0.9 for 30 layers
and the defaults), and half a pass for each of the `finalists` more for `loss`.

Not from a paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from come_pl.pruning.refit import Refit
from come_pl.record import Record
from come_pl.surgery import Kept, Norm, concatenate, dominant

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

Keep = Callable[[list[int], list[float]], list[Kept]]
GRID = (0.0, 0.5, 1.0)
STRENGTHS = (0.1, 1.0)


@dataclass
class Candidate:
    """A place, what is kept there, and what it costs."""

    layers: list[int]
    ratio: list[float]
    kept: list[Kept]
    error: float
    layer: nn.Module | None = None
    loss: float = math.inf


class Selector:
    """Chooses among candidates.

    Args:
        loss: decide by the calibration loss of the finalists, not by the local error.
        norm: norms of a new layer.
        sites: how many sites, by span distance.
        finalists: how many candidates the loss is measured of.
    """

    def __init__(self, loss: bool, norm: Norm, sites: int = 8, finalists: int = 4):
        self.loss, self.norm, self.sites, self.finalists = loss, norm, sites, finalists
        self.refit = Refit("down", folds=2)

    def choose(
        self,
        module: PruningModule,
        record: Record,
        spans: Sequence[float],
        keep: Keep,
    ) -> tuple[Candidate, list[float]]:
        """(the best candidate, the least local error at each site, infinity where none was tried).

        Args:
            spans: span distance of each site, infinity where a merge is forbidden.
            keep: (layers, ratio) → what each layer keeps.
        """
        order = sorted((s, i) for i, s in enumerate(spans) if s < math.inf)[: self.sites]
        found, errors = [], [math.inf] * len(spans)
        for _, first in order:
            for share in GRID:
                candidate = self._candidate(module, record, [first, first + 1], [share, 1 - share], keep)
                errors[first] = min(errors[first], candidate.error)
                found.append(candidate)
        found.sort(key=lambda c: c.error)
        if not self.loss:
            return found[0], errors
        for candidate in found[: self.finalists]:
            place = candidate.layers[dominant(candidate.ratio)]
            skip = [i for i in candidate.layers if i != place]
            bound = min(c.loss for c in found)
            assert candidate.layer is not None
            candidate.loss = module.loss(candidate.layers[0], swap={place: candidate.layer}, skip=skip, bound=bound)
        return min(found[: self.finalists], key=lambda c: c.loss), errors

    @torch.inference_mode()
    def _candidate(
        self, module: PruningModule, record: Record, layers: list[int], ratio: list[float], keep: Keep
    ) -> Candidate:
        student = module.student
        kept = keep(layers, ratio)
        new = concatenate(student, [student.layers[i] for i in layers], kept, ratio, self.norm)
        path, end = student.family.mlp_output, record.groups[layers[-1]][-1] + 1
        equations = self.refit.equations(module, layers[0], path, end, new, layers[dominant(ratio)])
        fit = equations.solve(STRENGTHS[0], STRENGTHS)
        tokens = max(float(module.sum(torch.tensor(float(sum(int(b["mask"].sum()) for b in module.batches))))), 1.0)
        unseen = float(equations.c.sum()) * (1.0 if fit is None else fit.error) / tokens
        if fit is not None and self.loss:
            projection = student.part(new, path)
            projection.weight.copy_(projection.weight.float() + fit.change)
            if fit.bias is not None:
                projection.bias.copy_(projection.bias.float() + fit.bias)
        return Candidate(layers, ratio, kept, unseen, new if self.loss else None)
