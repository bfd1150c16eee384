"""What every method that drops layers shares: an order fixed once, and Prune&Comp's compensation.

    α = mean_t |h_{l+k}| / mean_t |h_l|       layers l … l+k−1 are dropped; h: the student's stream as it is

After the drop the stream below it is multiplied by α, in the weights that write to it (`surgery.scale_stream`), so that
the layers above find it as large as they are used to (Prune&Comp, AAAI 2026).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from come_pl.decoder import Family
from come_pl.pruning.methods.base import Decision, Method
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.record import Record, Step

Compensation = Literal["none", "magnitude"]


def rounded(value: float) -> float:
    """Eight significant digits, as a record has them: a decision is the same from a record that was read again, and
    from sums that processes added in another order."""
    return float(f"{value:.8g}")


def growth(module: PruningModule, first: int, end: int, windows: int | None = None) -> float:
    """Mean L2 norm per counted token of the student's stream at boundary `end` over that at boundary `first`; of the
    first so many calibration windows, where that is said."""
    total = torch.zeros(2, dtype=torch.float64, device=module.device)
    for index in module.first_batches(windows):
        batch = module.batches[index]
        norms = [module.stream(index, b).float().norm(dim=-1).where(batch["mask"], 0.0) for b in (end, first)]
        total += torch.stack([n.sum(dtype=torch.float64) for n in norms])
    above, below = module.sum(total)
    return rounded(float(above / below))


class Drop(Method):
    """A method whose steps drop layers.

    Args:
        compensate: What follows a drop: none, or magnitude (the stream below the dropped layer is multiplied, in the
            weights, by what the layer multiplied its length by).
    """

    span = 1
    progressive = True
    spares_teacher = True

    def __init__(self, compensate: Compensation = "none"):
        self.compensate = compensate
        self.always = frozenset({"streams"} if compensate == "magnitude" else ())  # what any step needs

    def needs_for(self, record: Record) -> frozenset[str]:
        return self.needs | self.always

    def drop(self, module: PruningModule, layers: Sequence[int], name: str, scores: Sequence[float | None]) -> Decision:
        """The step that drops adjacent student layers, decided by the scores called `name`."""
        step = Step("drop", list(layers), scores={name: list(scores)})
        if self.compensate == "magnitude":
            step.scale = growth(module, layers[0], layers[-1] + 1, self.pass_windows)
        return Decision(step)


class Planned(Drop):
    """Measures the dense model once; what its later steps do is in the record's first. Later, nothing is measured,
    unless drops are compensated."""

    def needs_for(self, record: Record) -> frozenset[str]:
        return self.always if record.steps else super().needs_for(record)

    @staticmethod
    def left(record: Record) -> list[int]:
        """The dense layer that each layer of the student is."""
        return [layer for layer in record.sources if layer is not None]


class OneShot(Planned):
    """Every dense layer is scored once, on the dense model; layers go by ascending score, the lower of equals first.

    Scores are those in the record's first step, so that a run that was cut off goes on in the same order.
    """

    score_name: ClassVar[str]

    @abstractmethod
    def score(self, module: PruningModule, statistics: dict[str, Tensor]) -> Iterable[float]:
        """The score of each layer of the dense model."""

    def check(self, family: Family, layers: int, remove: int) -> None:
        self.held_back(layers)

    def held_back(self, depth: int) -> Collection[int]:
        """Dense layers of a model of `depth` layers that go only when no other layer is left."""
        return ()

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        if record.steps:
            scores = [s for s in record.steps[0].scores[self.score_name] if s is not None]
        else:
            scores = [rounded(s) for s in self.score(module, statistics)]
            lost = [i for i, s in enumerate(scores) if not math.isfinite(s)]
            if lost:
                raise NotFinite(f"{self.score_name} of layers {lost} is not finite; the model overflows in this dtype")
        back, alive = self.held_back(record.teacher_layers), self.left(record)
        chosen = min(range(len(alive)), key=lambda i: (alive[i] in back, scores[alive[i]], i))
        return self.drop(module, [chosen], self.score_name, [scores[i] for i in alive])
