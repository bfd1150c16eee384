"""What the head makes of some tokens: for repairs that go by predictions rather than by the stream.

    loss of a state h:  lse(W h) − y · h,     y = (E_{v ~ teacher} W_v + W_{next token}) / 2

W is the student's head. The mean over predicted tokens is that of the cross-entropies to the dense model's distribution
and to the text, up to a constant; of both only the vector y is kept of each token. Processes exchange the tokens, and
each solves the whole problem, so that what comes out does not depend on how many there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning.regression import folds_of, rounded_change, walked
from come_pl.taps import ROWS, logit_rows, targets_of

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule


@dataclass
class Positions:
    """Some predicted tokens.

    Attributes:
        read: what a repair reads of each (tokens, width), fp32.
        y: (tokens, hidden), fp32.
        following: the next token (tokens,).
    """

    read: tuple[Tensor, ...]
    y: Tensor
    following: Tensor

    def __len__(self) -> int:
        return len(self.y)


def predictable(module: PruningModule) -> bool:
    """Whether logits are the head of final states, and nothing else (Gemma 2 caps them)."""
    return getattr(module.student.config, "final_logit_softcapping", None) is None


@torch.inference_mode()
def positions(
    module: PruningModule, folds: int, least: int, read: Callable[[int], tuple[Tensor, ...]]
) -> tuple[Positions, Positions]:
    """(what is fitted to, what is not), of all processes, window after window.

    Args:
        folds: calibration windows are dealt into so many parts; the first is not fitted to.
        least: at least so many predicted tokens are looked at, evenly spread, where there are as many, and fewer than
            twice that.
        read: the number of a batch → what is to be kept of its tokens, each (batch, seq, width).
    """
    stride = max(1, math.floor(module.targets() / least))
    weight = module.student.model.get_output_embeddings().weight
    found: list[tuple[Tensor, ...]] = []  # of each window, filled up to as many rows as any has
    for number, batch in enumerate(module.batches):
        counted = targets_of(batch["mask"])
        picked = counted & ((counted.cumsum(1) - 1) % stride == 0)
        values = read(number)
        dense = module.teacher.final_norm(module.teacher_stream(number, len(module.teacher)))
        for window, fold in enumerate(folds_of(batch, folds)):
            rows = picked[window].nonzero().squeeze(1)
            following = batch["input_ids"][window, 1:][rows]
            y = 0.5 * _expected(module, dense[window, rows]) + 0.5 * weight[following].float()
            group = torch.full_like(following, int(fold == 0))
            room = -(-counted.shape[1] // stride) - len(rows)
            own = (*(value[window, rows].float() for value in values), y)
            filled = [F.pad(value, (0, 0, 0, room)) for value in own]
            found.append((*filled, F.pad(following, (0, room)), F.pad(group, (0, room), value=-1)))
    *read_all, y, following, group = (_gathered(module, torch.stack(values)) for values in zip(*found, strict=True))
    seen, unseen = (
        Positions(tuple(value[group == which] for value in read_all), y[group == which], following[group == which])
        for which in (0, 1)
    )
    return seen, unseen


def newton(
    start: Tensor,
    loss: Callable[[Tensor], float],
    step: Callable[[Tensor], Callable[[float], Tensor]],
    grid: Sequence[float],
    begin: float,
    steps: int,
) -> Tensor | None:
    """Newton's method with a ridge that is chosen by the loss on unseen text; None where no step makes it less.

    Args:
        loss: of a point, on text that `step` has not seen.
        step: a point → λ → what is to be taken off there; not finite where it cannot be solved for.
        grid: λ, ascending; the search begins at `begin`, and at what the step before found.
        steps: at most so many are taken.
    """
    here, place, best = start, grid.index(begin), loss(start)
    for _ in range(steps):
        solved = step(here)

        @functools.cache
        def tried(index: int, here: Tensor = here, solved: Any = solved) -> tuple[float, Tensor]:
            change = solved(grid[index])
            if not bool(change.isfinite().all()):
                return math.inf, here
            there = here - rounded_change(change).to(here)
            return loss(there), there

        place = walked(lambda index: tried(index)[0], place, len(grid))
        least, there = tried(place)
        if not least < best:
            break
        best, here = least, there
    return None if here is start else here


def _gathered(module: PruningModule, own: Tensor) -> Tensor:
    """Windows (windows, rows, …) of all processes in the order of the text, which deals them out in turn, as one
    (tokens, …)."""
    if module.world > 1:
        own = module.all_gather(own).transpose(0, 1).flatten(0, 1)  # type: ignore[union-attr]
    return own.flatten(0, 1)


def _rows(decoder: Decoder) -> int:
    """How many tokens' logits are held at once: these go through the head twice, where few rows are slow."""
    return max(ROWS, logit_rows(decoder, 2))


def _expected(module: PruningModule, states: Tensor) -> Tensor:
    """The student's head (hidden,) in the mean over the teacher's next tokens, of its final states (tokens, hidden)."""
    weight = module.student.model.get_output_embeddings().weight
    found = [weight.new_zeros(0, weight.shape[1], dtype=torch.float32)]
    for part in states.split(_rows(module.teacher)):
        found.append(expected(weight, module.teacher.logits(part).float()))
    return torch.cat(found)


def expected(weight: Tensor, logits: Tensor) -> Tensor:
    """The head's `weight` (vocab, hidden) in the mean over the tokens that logits (tokens, vocab) tell; fp32."""
    return (logits.softmax(-1).to(weight.dtype) @ weight).float()


def logits_of(
    module: PruningModule, at: Positions, states: Callable[[slice], Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their final states (rows, hidden) as `states` gives them, fp32 logits), a few rows at a time."""
    head = module.student.model.get_output_embeddings()
    size = _rows(module.student)
    for begin in range(0, len(at), size):
        rows = slice(begin, begin + size)
        h = states(rows)
        yield rows, h, head(h.to(head.weight.dtype)).float()


def loss(module: PruningModule, at: Positions, states: Callable[[slice], Tensor]) -> float:
    """Nats a token, up to a constant, of final states; infinite where it is not a number."""
    total = torch.zeros((), dtype=torch.float64, device=module.device)
    for rows, h, logits in logits_of(module, at, states):
        total += (logits.logsumexp(-1) - (at.y[rows] * h).sum(-1)).sum(dtype=torch.float64)
    nats = float(total)
    return math.inf if math.isnan(nats) else nats / len(at)
