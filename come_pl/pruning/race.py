"""Giving up candidates that are clearly worse than the best so far.

Both ran on the same tokens, so what tells them apart is the differences d_t of their losses at each, which vary far
less than the losses do. After n tokens a candidate is given up when

    Σ d_t / n  >  z · sqrt(Σ (d_t − mean d)² / n) / sqrt(n)

Neighbouring tokens are not independent, and a loss is looked at several times: z is larger than a single test of
independent tokens would ask for. Unlike a bound on the partial sum, this may give up the best: a search says when it is
used. Racing: Maron and Moore, Hoeffding races, NeurIPS 1993; the paired differences follow Moore and Lee, ICML 1994.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Look = tuple[int, slice]  # a batch, and windows of it


class Race:
    """Token losses of the best candidate so far.

    Args:
        errors: z, how many standard errors a candidate is given up at.
    """

    def __init__(self, errors: float = 4.0):
        self.errors = errors
        self._best: dict[int, Tensor] = {}  # batch → (batch, seq − 1)
        self.begin()

    @property
    def leading(self) -> bool:
        """Whether there is a candidate to compare with."""
        return bool(self._best)

    def begin(self) -> None:
        """The next candidate starts."""
        self._own: dict[int, list[Tensor]] = {}
        self._totals = [0.0, 0.0, 0.0]  # tokens, Σ d, Σ d²

    def lost(self, look: Look, losses: Tensor, counted: Tensor) -> bool:
        """Whether the candidate may stop after some more windows.

        Args:
            look: which windows; those of a batch come in order.
            losses: (windows, seq − 1), of the candidate.
            counted: (windows, seq − 1), True where a token is predicted.
        """
        index, rows = look
        self._own.setdefault(index, []).append(losses)
        if not self.leading:
            return False
        # zero where nothing is counted, on both sides
        differences = (losses - self._best[index][rows]).double()
        found = torch.stack([counted.sum().double(), differences.sum(), differences.square().sum()]).tolist()
        self._totals = [a + b for a, b in zip(self._totals, found, strict=True)]
        tokens, total, squares = max(self._totals[0], 1.0), *self._totals[1:]
        variance = max(squares / tokens - (total / tokens) ** 2, 0.0)
        return not total / tokens <= self.errors * math.sqrt(variance / tokens)  # NaN has lost

    def won(self) -> None:
        """The candidate ran to its end and leads now."""
        self._best = {index: torch.cat(parts) for index, parts in self._own.items()}
