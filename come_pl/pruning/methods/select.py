"""CoMe's merge site and ratio by what they cost once the new layer is refitted.

    local   (l*, r*) = argmin  Σ_t w_t ‖T_t − out_t − Δ x_t‖² / tokens,   over tokens not fitted to
    loss    (l*, r*) = argmin  calibration loss of the student with the refitted layer, over the best few of `local`

T is the teacher's stream after the group, out and x the candidate's output and the input of its `down_proj`, Δ the
ridge fit to one half of some calibration windows, the error that on the other half (and the other way round). The ratio
runs over a small grid; 0 and 1 keep one layer whole, norms included, so a drop is among the candidates.

Candidates are the `sites` with the least span distance times the grid. The cost of a step beyond CoMe's own, in passes
over the calibration windows of a model with L layers: at most sites · ratios / L for `local` (0.8 for 30 layers and the
defaults, plus the sums of the fits; sites below the last step keep their errors), and about half a pass more for each
of the `finalists` for `loss`.

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
from come_pl.pruning.regression import Fit
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
    norm: Norm
    error: float
    fit: Fit | None

    @property
    def place(self) -> int:
        """The layer whose config entries (sliding window, rotary table) the new layer will have."""
        return self.layers[dominant(self.ratio)]


class Selector:
    """Chooses among candidates.

    Args:
        loss: decide by the calibration loss of the finalists, not by the local error.
        norm: norms of a new layer.
        sites: how many sites, by span distance.
        finalists: how many candidates the loss is measured of.
        tokens: of the calibration windows that local errors are measured on, rounded up to whole batches.
    """

    def __init__(self, loss: bool, norm: Norm, sites: int = 8, finalists: int = 4, tokens: int = 8192):
        self.loss, self.norm, self.sites, self.finalists, self.tokens = loss, norm, sites, finalists, tokens
        self.refit = Refit("down", folds=2)
        self._known: dict[int, list[Candidate]] = {}  # by site

    def choose(
        self, module: PruningModule, record: Record, spans: Sequence[float], keep: Keep
    ) -> tuple[Candidate, list[float]]:
        """(the best candidate, the least local error at each site, infinity where none was tried).

        Args:
            spans: span distance of each site, infinity where a merge is forbidden.
            keep: (layers, ratio) → what each layer keeps.
        """
        # below the last step neither the layers nor what they are given has changed
        lowest = record.steps[-1].layers[0] if record.steps else 0
        self._known = {site: known for site, known in self._known.items() if site + 1 < lowest}
        errors, found = [math.inf] * len(spans), []
        for _, site in sorted((s, i) for i, s in enumerate(spans) if s < math.inf)[: self.sites]:
            if site not in self._known:
                pair = [site, site + 1]
                self._known[site] = [self._candidate(module, record, pair, [r, 1 - r], keep) for r in GRID]
            found += self._known[site]
            errors[site] = min(c.error for c in self._known[site])
        found.sort(key=lambda c: c.error)
        if not self.loss:
            return found[0], errors
        best, bound = found[0], math.inf
        for candidate in found[: self.finalists]:
            skip = [i for i in candidate.layers if i != candidate.place]
            new = self._layer(module, candidate)
            loss = module.loss(candidate.layers[0], swap={candidate.place: new}, skip=skip, bound=bound)
            if loss < bound:
                best, bound = candidate, loss
        return best, errors

    @torch.inference_mode()
    def _candidate(
        self, module: PruningModule, record: Record, layers: list[int], ratio: list[float], keep: Keep
    ) -> Candidate:
        norm = self.norm if min(ratio) > 0 else "dominant"  # what keeps one layer whole keeps its norms too: a drop
        candidate = Candidate(layers, ratio, keep(layers, ratio), norm, math.inf, None)
        new = self._layer(module, candidate)
        end = record.groups[layers[-1]][-1] + 1
        path = module.student.family.mlp_output
        windows = -(-self.tokens // module.batches[0]["input_ids"].shape[1])
        equations = self.refit.equations(module, layers[0], path, end, new, candidate.place, windows)
        fit = equations.solve(STRENGTHS[0], STRENGTHS)
        error = float(equations.c.sum() / equations.tokens) * (1.0 if fit is None else fit.error)
        candidate.error = float(f"{error:.6g}")
        candidate.fit = fit if self.loss else None
        return candidate

    @torch.inference_mode()
    def _layer(self, module: PruningModule, candidate: Candidate) -> nn.Module:
        student = module.student
        layers = [student.layers[i] for i in candidate.layers]
        new = concatenate(student, layers, candidate.kept, candidate.ratio, candidate.norm)
        if candidate.fit is not None:
            projection = student.part(new, student.family.mlp_output)
            projection.load_state_dict(candidate.fit.added_to(projection), strict=False)
        return new
