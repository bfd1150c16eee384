"""Giving up candidates that are clearly worse than the best so far.

All ran on the same tokens, so what tells two apart is the differences d_t of what they give at each, which vary far
less than what they give. After n tokens all that are left are compared with the one of the least mean, and one is given
up when

    Σ d_t / n  >  z · sqrt(Σ (d_t − mean d)² / n) / sqrt(n)

Neighbouring tokens are not independent, and a candidate is looked at several times: z is larger than a single test of
independent tokens would ask for. Unlike a bound on the partial sum, this may give up the best: a search says when it is
used. Racing: Maron and Moore, Hoeffding races, NeurIPS 1993; the paired differences follow Moore and Lee, ICML 1994.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

ERRORS = 4.0  # z
Look = tuple[int, slice]  # a batch, and windows of it


def clearly_worse(
    values: Tensor, counted: Tensor, total: Callable[[Tensor], Tensor], errors: float = ERRORS
) -> tuple[int, list[bool], list[float]]:
    """(the candidate of the least mean, the first of equals; which of them have lost; by how much each mean is above
    the least).

    Args:
        values: (candidates, tokens), fp64, of this process; NaN has lost.
        counted: (tokens,), True where a token counts.
        total: sum of a tensor over processes.
        errors: z.
    """
    values = torch.where(counted, values, 0.0)
    sums = total(torch.cat([values.sum(1), counted.sum(dtype=torch.float64)[None]]))
    tokens = sums[-1].clamp(min=1)
    leader = int(torch.where(sums[:-1].isnan(), math.inf, sums[:-1]).argmin())
    differences = values - values[leader]
    above, squares = total(torch.stack([differences.sum(1), differences.square().sum(1)])) / tokens
    deviation = (squares - above.square()).clamp(min=0).sqrt()
    lost = ~(above <= errors * deviation / tokens.sqrt())
    lost[leader] = False
    return leader, lost.tolist(), above.nan_to_num(nan=math.inf).tolist()


class Race:
    """Candidates that run side by side, some windows at a time.

    Attributes:
        winner: of the last race; -1 before.
        above: candidate → its mean above the winner's, on tokens that both ran on.

    Args:
        measure: (candidate, look) → its losses (windows, seq − 1), 0 where nothing is predicted.
        looks: what of the calibration text comes in which order; as many on every process.
        counted: look → (windows, seq − 1), True where a token is predicted.
        total: sum of a tensor over processes.
        errors: z.
    """

    def __init__(
        self,
        measure: Callable[[int, Look], Tensor],
        looks: Sequence[Look],
        counted: Callable[[Look], Tensor],
        total: Callable[[Tensor], Tensor],
        errors: float = ERRORS,
    ):
        self.measure, self.looks, self.total, self.errors = measure, looks, total, errors
        self.counted = [counted(look).flatten() for look in looks]
        self._losses: dict[int, list[Tensor]] = {}  # candidate → of the looks so far
        self.winner, self.above = -1, dict[int, float]()

    def best(self, candidates: Iterable[int]) -> int:
        """The winner; the lowest of equals. What was measured before is not measured again."""
        left = sorted(candidates)
        gone: dict[int, tuple[int, float]] = {}  # in the order in which they were given up: who led then, how far above
        leader = left[0]
        for count in range(1, len(self.looks) + 1):
            for candidate in left:
                self._reach(candidate, count)
            values = torch.stack([torch.cat(self._losses[c][:count]) for c in left]).double()
            place, lost, ahead = clearly_worse(values, torch.cat(self.counted[:count]), self.total, self.errors)
            leader = left[place]
            gone |= {c: (leader, a) for c, a, out in zip(left, ahead, lost, strict=True) if out}
            distances = dict(zip(left, ahead, strict=True))
            left = [c for c, out in zip(left, lost, strict=True) if not out]
            if len(left) == 1:
                break
        known = {candidate: distances[candidate] for candidate in left}
        for candidate, (to, above) in reversed(gone.items()):  # whoever led then is left, or was given up later
            known[candidate] = above + known[to]
        before = known.get(self.winner, 0.0)
        self.above = {candidate: above + before for candidate, above in self.above.items()} | known
        self.winner = leader
        return leader

    def mean(self, candidate: int) -> float:
        """Nats a token of a candidate on all that it ran on; infinite where that is not a number."""
        losses = torch.cat(self._losses[candidate]).double()
        counted = torch.cat(self.counted[: len(self._losses[candidate])])
        sums = self.total(torch.stack([losses[counted].sum(), counted.sum(dtype=torch.float64)])).tolist()
        mean = sums[0] / max(sums[1], 1.0)
        return math.inf if math.isnan(mean) else mean

    def _reach(self, candidate: int, count: int) -> None:
        found = self._losses.setdefault(candidate, [])
        for look in self.looks[len(found) : count]:
            found.append(self.measure(candidate, look).flatten())
