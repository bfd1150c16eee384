"""Giving up candidates that are clearly worse than the best so far.

All ran on the same tokens, so what tells two apart is the differences d_t of what they give at each, which vary far
less than what they give. After n tokens all that are left are compared with the one of the least mean, and one is given
up when

    Σ d_t / n  >  z · sqrt(Σ (d_t − mean d)² / n) / sqrt(n)

Neighbouring tokens are not independent, and a candidate is looked at several times: z is larger than a single test of
independent tokens would ask for. Unlike a bound on the partial sum, this may give up the best: a search says when it is
used. Where one that is at most δ above the best will do, δ is added on the left: what is surely not better by more than
δ is given up. Racing: Maron and Moore, Hoeffding races, NeurIPS 1993; the paired differences and the δ follow Moore and
Lee, Efficient algorithms for minimizing cross validation error, ICML 1994.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

ERRORS = 4.0  # z
Look = tuple[int, slice]  # a batch, and windows of it


def clearly_worse(
    values: Tensor, counted: Tensor, total: Callable[[Tensor], Tensor], errors: float = ERRORS, close: float = 0.0
) -> tuple[int, list[bool], list[float]]:
    """(the candidate of the least mean, the first of equals; which of them have lost; by how much each mean is above
    the least).

    Args:
        values: (candidates, tokens), fp64, of this process; NaN has lost.
        counted: (tokens,), True where a token counts.
        total: sum of a tensor over processes.
        errors: z.
        close: δ.
    """
    values = torch.where(counted, values, 0.0)
    sums = total(torch.cat([values.sum(1), counted.sum(dtype=torch.float64)[None]]))
    tokens = sums[-1].clamp(min=1)
    leader = int(torch.where(sums[:-1].isnan(), math.inf, sums[:-1]).argmin())
    differences = values - values[leader]
    above, squares = total(torch.stack([differences.sum(1), differences.square().sum(1)])) / tokens
    deviation = (squares - above.square()).clamp(min=0).sqrt()
    lost = ~(above + close <= errors * deviation / tokens.sqrt())
    lost[leader] = False
    return leader, lost.tolist(), above.nan_to_num(nan=math.inf).tolist()


class Standing:
    """Candidates of a race: who leads, who is left, how far above the leader each is or was when it was given up.

    Attributes:
        left: candidates, ascending.
        leader: the candidate of the least mean so far.
    """

    def __init__(self, candidates: Iterable[int]):
        self.left = sorted(candidates)
        self.leader = self.left[0]
        self._now: dict[int, float] = {}
        self._gone: dict[int, tuple[int, float]] = {}  # in the order of giving up: who led then, how far above

    def compare(
        self,
        values: Tensor,
        counted: Tensor,
        total: Callable[[Tensor], Tensor],
        errors: float,
        close: float = 0.0,
    ) -> None:
        """As `clearly_worse`, with a row of values for each that is left; those that have lost are left no more."""
        place, lost, above = clearly_worse(values, counted, total, errors, close)
        self.leader = self.left[place]
        self._now = dict(zip(self.left, above, strict=True))
        self._gone |= {c: (self.leader, self._now[c]) for c, out in zip(self.left, lost, strict=True) if out}
        self.left = [c for c in self.left if c not in self._gone]

    def above(self) -> dict[int, float]:
        """Candidate → its mean above the leader's, on tokens that it and whoever led then ran on."""
        found = {candidate: self._now.get(candidate, 0.0) for candidate in self.left}
        for candidate, (to, above) in reversed(self._gone.items()):  # who led then is left, or was given up later
            found[candidate] = above + found[to]
        return found


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
        close: δ.
    """

    def __init__(
        self,
        measure: Callable[[int, Look], Tensor],
        looks: Sequence[Look],
        counted: Callable[[Look], Tensor],
        total: Callable[[Tensor], Tensor],
        errors: float,
        close: float = 0.0,
    ):
        self.measure, self.looks, self.total = measure, looks, total
        self.errors, self.close = errors, close
        self.counted = [counted(look).flatten() for look in looks]
        self._losses: dict[int, list[Tensor]] = {}  # candidate → of the looks so far
        self.winner, self.above = -1, dict[int, float]()

    def best(self, candidates: Iterable[int]) -> int:
        """The winner; the lowest of equals. What was measured before is not measured again."""
        standing = Standing(candidates)
        for count in range(1, len(self.looks) + 1):
            for candidate in standing.left:
                self._reach(candidate, count)
            values = torch.stack([torch.cat(self._losses[c][:count]) for c in standing.left]).double()
            standing.compare(values, torch.cat(self.counted[:count]), self.total, self.errors, self.close)
            if len(standing.left) == 1:
                break
        known = standing.above()
        before = known.get(self.winner, 0.0)
        self.above = {candidate: above + before for candidate, above in self.above.items()} | known
        self.winner = standing.leader
        return self.winner

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
