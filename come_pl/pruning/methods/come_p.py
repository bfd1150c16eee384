"""CoMe-P: CoMe with the merge ratio found by search (arXiv 2510.15304).

    l*  = argmin_l arccos(cos(h_l, h_{l+2})) / π     (all tokens)
    r*  = argmin_{r ∈ {0, 1/g, …, 1}} calibration loss of the student with concatenate(l*, l*+1; r, 1 − r)

Pairs only; g = 20. A candidate is an index selection of two layers' weights and a run from l* upward; one whose partial
loss is already above the best is given up, which changes no choice. So that this happens early, every 4th point of the
grid comes first, then the points around the best at half the distance, and so on down to its neighbours; `full` then
tries all the others, those near the best first, `coarse` ends there, with a point that is no worse than its neighbours.
`race` runs candidates side by side and gives one up as soon as it is clearly above the best of the same tokens
(`come_pl/pruning/race.py`); the losses in the scores are then the winner's, and that plus the mean difference to it. A
coarse race also gives up what can be better by no more than `close`: neighbours on the grid differ by so little that
most of the text would go into telling them apart.

Differs from the released code in: it runs (there the ratio is used before it is set); the whole model is not copied
for each candidate; and what CoMe's own file lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from come_pl.pruning.methods.base import Decision
from come_pl.pruning.methods.come import CoMe, pick, sensitivity
from come_pl.pruning.methods.common import check
from come_pl.record import Record
from come_pl.surgery import Kept, Norm, concatenate, dominant

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

Search = Literal["full", "coarse"]
Candidate = tuple[list[float], list[Kept], nn.Module, dict[str, Any]]  # ratio, channels, layer, how it runs


def first_stride(granularity: int) -> int:
    """Distance of the grid points that are tried first: the largest power of two up to a fifth of the grid."""
    return 2 ** int(math.log2(max(granularity // 5, 1)))


def most_tried(granularity: int) -> int:
    """How many points of the grid a coarse search tries at most: the first ones, and two at each smaller distance."""
    stride = first_stride(granularity)
    return -(-granularity // stride) + 1 + 2 * int(math.log2(stride))


def walk(best_of: Callable[[set[int]], int], granularity: int) -> int:
    """The best point that a coarse search finds of 0 … `granularity`; `best_of` says which of some points it is."""
    stride = first_stride(granularity)
    found = best_of({*range(0, granularity, stride), granularity})
    while stride > 1:
        stride //= 2
        found = best_of({found - stride, found, found + stride} & set(range(granularity + 1)))
    return found


def least(loss: Callable[[int, float], float], granularity: int, share: float, search: Search) -> dict[int, float]:
    """What was tried of the points 0 … `granularity`, in the order of trying: point → loss.

    Args:
        loss: (point, bound) → its loss, or infinity for one above the bound; NaN is taken for infinity.
        share: where the least loss is expected, in [0, 1]; says what is tried first, not what is found.
    """
    found: dict[int, float] = {}

    def best_of(points: set[int]) -> int:
        near = best(found) if found else share * granularity
        for point in sorted(points - set(found), key=lambda p: (abs(p - near), p)):
            value = loss(point, min(found.values(), default=math.inf))
            found[point] = math.inf if math.isnan(value) else value
        return best(found)

    walk(best_of, granularity)
    if search == "full":
        best_of(set(range(granularity + 1)))
    return found


def best(found: dict[int, float]) -> int:
    """The point of the least loss; the lowest of equals."""
    return min(found, key=lambda point: (found[point], point))


class CoMeP(CoMe):
    """CoMe with posterior search over the merge ratio.

    Args:
        granularity: Number of intervals of the ratio grid.
        norm: Norms of a new layer: mean (released code), dominant, or fold (each kept channel sees its own layer's).
        wo_repeat: Forbid merging an already merged layer again; by default it is done only when no other site is left.
        skip_method: How the site is chosen: bi (span distance), sleb (least loss with the layers removed), mka (always
            the last layers).
        span_tokens: Tokens that the span distance is taken over: last (of each window) or all.
        search: Points of the grid that are tried: full (all; the least loss is found), or coarse (every 4th of 20, then
            those around the best; fewer than half, and a loss no higher than at the points beside it).
        race: Stop measuring sites and ratios that are clearly worse than the best after a part of the text; the same
            choice unless chance is against it.
        close: Nats a token that a coarse race does not tell ratios apart by, to read less: 0.005 is half a per cent of
            perplexity in each step. 0: the best of what is tried.
    """

    def __init__(
        self,
        granularity: int = 20,
        norm: Norm = "mean",
        wo_repeat: bool | None = None,
        skip_method: Literal["bi", "sleb", "mka"] = "bi",
        span_tokens: Literal["last", "all"] = "all",
        search: Search = "full",
        race: bool = False,
        close: float = 0.0,
    ):
        if granularity < 1:
            raise ValueError(f"granularity {granularity}: at least 1 interval")
        if not 0 <= close < math.inf:
            raise ValueError(f"close {close}: nats a token, 0 or more")
        if close and not (race and search == "coarse"):
            raise ValueError(f"close {close}: it is for a coarse race, and needs search coarse, race true")
        check(search=(search, Search))
        super().__init__(rho=0.0, norm=norm, wo_repeat=wo_repeat, skip_method=skip_method, span_tokens=span_tokens)
        self.race_sites = race and skip_method == "bi" and span_tokens == "all"
        self.granularity, self.search, self.race, self.close = granularity, search, race, close

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        step = super().__call__(module, statistics, record, remove=remove).step
        assert step.ratio is not None
        student, layers = module.student, [module.student.layers[i] for i in step.layers]
        scores = [sensitivity(student, i, statistics) for i in step.layers]  # the same for every candidate

        def candidate(tick: int) -> Candidate:
            ratio = [tick / self.granularity, 1 - tick / self.granularity]
            kept = pick(student.geometry, scores, ratio)
            layer = concatenate(student, layers, kept, ratio, self.norm)
            # it runs in the place of the layer whose config entries (sliding window, rotary table) it will have
            place = step.layers[dominant(ratio)]
            skip = [i for i in step.layers if i != place]
            return ratio, kept, layer, {"start": step.layers[0], "swap": {place: layer}, "skip": skip}

        found = self.raced(module, candidate) if self.race else self.searched(module, candidate, step.ratio[0])
        step.scores["ratio_loss"] = [found.get(tick) for tick in range(self.granularity + 1)]
        if min(found.values()) == math.inf:
            return Decision(step)
        step.ratio, step.kept, layer, _ = candidate(best(found))
        return Decision(step, layer)

    def searched(self, module: PruningModule, candidate: Callable[[int], Candidate], share: float) -> dict[int, float]:
        """Point → its calibration loss, or infinity for one that was given up; what the grid's search tried."""
        return least(
            lambda tick, bound: module.loss(**candidate(tick)[-1], bound=bound), self.granularity, share, self.search
        )

    def raced(self, module: PruningModule, candidate: Callable[[int], Candidate]) -> dict[int, float]:
        """Point → the winner's calibration loss on what it ran on, plus how far the point's is above it."""
        race = module.race(lambda tick: candidate(tick)[-1], close=self.close)
        points = range(self.granularity + 1)
        winner = race.best(points) if self.search == "full" else walk(race.best, self.granularity)
        return {tick: race.mean(winner) + above for tick, above in race.above.items()}
