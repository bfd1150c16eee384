"""What a method is: something that looks at a student and decides the next step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from come_pl.pruning.sites import Sites
from come_pl.record import Record, Step

if TYPE_CHECKING:
    from come_pl.decoder import Family
    from come_pl.pruning.module import PruningModule


@dataclass
class Decision:
    """A step, and the merged layer if the method built it already."""

    step: Step
    layer: nn.Module | None = None


class NoSite(ValueError):
    """Every place where a step could be taken is forbidden."""


class Method(ABC):
    """Decides one step at a time.

    Class attributes:
        needs: what the calibration pass collects for it, of `channel_intensity`, `block_influence`, `span_distance`
            (the last two come together) and `streams` (nothing but the streams that `module.loss` and `module.stream`
            start from); empty for a method that looks at weights only.
        progressive: whether its first steps are the same whatever depth it goes on to.
        spares_teacher: whether it decides from the student alone, so that dense layers that are gone from the student
            need not stay in memory.
        pass_windows: calibration windows that passes before a step run on, rounded up to whole batches, for a method
            that looks at no others; all without it.
        channel_windows: calibration windows of which it looks at what the dense model's MLPs give their output
            projections, so that the first pass keeps it as far as there is room.
        writes: layers that a step gives weights of their own, at most.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    span = 2  # layers that a span distance covers
    progressive = False
    spares_teacher = False
    pass_windows: int | None = None
    channel_windows = 0
    writes = 0

    def needs_for(self, record: Record) -> frozenset[str]:
        """What the next step needs of `needs`; without any no pass is run."""
        return self.needs

    def sites(self, record: Record, remove: int) -> Sites | None:
        """The spans that the next step may take, for a method that takes one of the least distance of all tokens and
        may give others up before all text has run through them; None: everything runs."""
        return None

    @property
    def by_batches(self) -> bool:
        """Whether its steps depend on which windows are in a batch, of all processes: it trains, or races candidates
        batch after batch."""
        return any(getattr(self, name, False) for name in ("epochs", "race", "race_sites"))

    def dealt(self, at_once: int) -> dict[str, int]:
        """What of `at_once` windows in the batches of all processes together decides its steps."""
        named = {name: getattr(self, name, None) for name in ("windows", "pass_windows")}
        found = {name: -(-count // at_once) * at_once for name, count in named.items() if count is not None}
        return found | ({"at_once": at_once} if self.by_batches else {})

    def check(self, family: Family, layers: int, remove: int) -> None:
        """Raises ValueError, before a model is loaded or text is run, for one of `layers` layers that the method cannot
        take `remove` from."""
        return None

    @abstractmethod
    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        """The next step.

        Args:
            module: teacher, student, and the calibration loss of candidates (`module.loss`).
            statistics: of the student as it is, see `taps.LayerStatistics`.
            record: the steps so far.
            remove: layers still to be removed; a step removes at most that many.
        """
