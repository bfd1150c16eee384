"""Choosing a merge site before all calibration text has run through all layers.

Every token has a span distance at every site, so sites are compared token by token (`race.py`), batch after batch. The
first batch runs through all layers; each batch after it only as far as the highest site that is left. What the winner's
layers are measured with (block influence, channel intensities) has then come from all tokens. Before a step that falls
below the one before, nothing runs again but the first batch, if the sites above it lose there.

A site that was given up has as its score the winner's plus how far it was above the best when it was given up; what is
measured of layers above the winner's is of a part of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from come_pl.pruning.race import ERRORS, Standing


@dataclass
class Sites:
    """Spans of `size` layers that a step may take, by the boundaries where they end."""

    ends: list[int]
    size: int


class SiteRace:
    """Distances of each token across each span, as far as they were measured, and the sites that are left."""

    def __init__(self) -> None:
        self._standing: Standing | None = None  # none: no race
        self._size = 0
        self._distances: dict[tuple[int, int, int], Tensor] = {}  # batch, end, layers → (windows, seq)

    def begin(self, sites: Sites | None) -> None:
        """For the next step."""
        self._standing = None if sites is None else Standing(sites.ends)
        self._size = 0 if sites is None else sites.size

    def seen(self, batch: int, end: int, size: int, distances: Tensor) -> None:
        """Distances (windows, seq) of a batch across `size` layers that end at a boundary."""
        if self._standing is not None:
            self._distances[batch, end, size] = distances.float()

    def forget(self, lowest: int) -> None:
        """Layers from `lowest` on are others now."""
        self._distances = {key: value for key, value in self._distances.items() if key[1] <= lowest}

    @property
    def stop(self) -> int | None:
        """The layer that the next batch need not run, nor those above; None: all run."""
        return None if self._standing is None else max(self._standing.left)

    def narrow(self, masks: Sequence[Tensor]) -> None:
        """Give up what is clearly worse on the first batches, by their masks (windows, seq)."""
        if self._standing is None:
            return
        batches = range(len(masks))
        rows = [
            torch.cat([self._distances[index, end, self._size].flatten() for index in batches])
            for end in self._standing.left
        ]
        counted = torch.cat([mask.flatten() for mask in masks])
        self._standing.compare(torch.stack(rows).double(), counted, lambda total: total, ERRORS)

    def settle(self, statistics: dict[str, Tensor], span: int) -> None:
        """Puts the mean distances of a pass that did not run all sites to its end on the same ground.

        Args:
            span: layers of the longest span.
        """
        if self._standing is None:
            return
        scores = statistics["span_all" if self._size == span else f"span_all_{self._size}"]
        best = float(scores[self._standing.leader - self._size])
        for end, above in self._standing.above().items():
            if end not in self._standing.left:
                scores[end - self._size] = best + above
