"""What the head makes of some tokens: for repairs that go by predictions rather than by the stream.

    loss of a state h:  lse(W h) − y · h,     y = (E_{v ~ teacher} W_v + W_{next token}) / 2

W is the student's head. The mean over predicted tokens is that of the cross-entropies to the dense model's distribution
and to the text, up to a constant; of both only the vector y is kept of each token.
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
from come_pl.pruning.regression import rounded_change, walked
from come_pl.taps import ROWS, logit_rows

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

ENOUGH = 2e-3  # nats a token of a step after which another would bring next to nothing


@dataclass
class Targets:
    """What some tokens predict.

    Attributes:
        y: (tokens, hidden), fp32.
        following: the next token (tokens,).
    """

    y: Tensor
    following: Tensor

    def __len__(self) -> int:
        return len(self.y)


def predictable(module: PruningModule) -> bool:
    """Whether logits are the head of final states, and nothing else (Gemma 2 caps them)."""
    return getattr(module.student.config, "final_logit_softcapping", None) is None


def targets(module: PruningModule) -> Callable[[Tensor, Tensor], Tensor]:
    """(final states of the teacher, after its norm (tokens, hidden), next tokens (tokens,)) → y (tokens, hidden)."""
    weight = module.student.model.get_output_embeddings().weight
    by_teacher = Expected(module.teacher, weight)
    return lambda dense, following: 0.5 * by_teacher(dense) + 0.5 * weight[following].float()


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
        steps: at most so many are taken; none after one that brought less than `ENOUGH`.
    """
    here, place, best = start, grid.index(begin), loss(start)
    for _ in range(steps):
        solved = step(here)

        def there(index: int, here: Tensor = here, solved: Any = solved) -> Tensor:
            change = solved(grid[index])
            return here - rounded_change(change).to(here) if bool(change.isfinite().all()) else change

        @functools.cache  # losses alone: points can be large
        def tried(index: int, there: Any = there) -> float:
            point = there(index)
            return loss(point) if bool(point.isfinite().all()) else math.inf

        place = walked(tried, place, len(grid))
        if not tried(place) < best:
            break
        brought, best, here = best - tried(place), tried(place), there(place)
        if brought < ENOUGH:
            break
    return None if here is start else here


class Divergence:
    """KL(dense ‖ other) of some tokens, from final states alone. With p what the dense model predicts, q the other,

        Σ_v p_v (log p_v − log q_v) = lse(W h) − y · h − (the same of the dense state),     y = Σ_v p_v W_v

    so that the dense model's logits are computed once, and not kept. In half precision roundings would not cancel out.

    Args:
        decoder: whose head, in fp32, is that of both (`predictable`).
        dense: final states (tokens, hidden).
    """

    def __init__(self, decoder: Decoder, dense: Tensor):
        weight = decoder.model.get_output_embeddings().weight
        self.decoder, self.size = decoder, _rows(decoder)
        self.y = torch.cat([expected(weight, decoder.logits(h)) for h in dense.split(self.size)])
        self.least = self._nats(dense)

    def __call__(self, states: Tensor) -> Tensor:
        """Nats (tokens,), fp64, of final states (tokens, hidden)."""
        return self._nats(states) - self.least

    def _nats(self, states: Tensor) -> Tensor:
        found = []
        for h, y in zip(states.split(self.size), self.y.split(self.size), strict=True):
            # in fp64: what is left of a small divergence is a difference of numbers that are not small
            told = (y.double() * h.double()).sum(-1)
            found.append(self.decoder.logits(h).logsumexp(-1).double() - told)
        return torch.cat(found)


def _rows(decoder: Decoder) -> int:
    """How many tokens' logits are held at once: these go through the head twice, where few rows are slow."""
    return max(ROWS, logit_rows(decoder))


def expected(weight: Tensor, logits: Tensor) -> Tensor:
    """The head's `weight` (vocab, hidden) in the mean over the tokens that logits (tokens, vocab) tell; fp32."""
    return (logits.softmax(-1).to(weight.dtype) @ weight).float()


class Expected:
    """`expected` of what a decoder makes of final states, in the precision of its layers' products. That is enough for
    derivatives; losses of two changes can be closer to each other than that.

    Args:
        decoder: one whose logits are those of its head (`predictable`). The head is cast once, as heads are large: what
            comes and goes beside results that stay would leave memory in pieces.
        weight: what the mean is taken of (vocab, hidden).
    """

    def __init__(self, decoder: Decoder, weight: Tensor):
        kind, own = decoder.products or weight.dtype, decoder.model.get_output_embeddings()
        self.head, self.bias = own.weight.to(kind), None if own.bias is None else own.bias.to(kind)
        self.weight = self.head if own.weight is weight else weight.to(kind)
        self.size = _rows(decoder)

    def __call__(self, states: Tensor) -> Tensor:
        """(tokens, hidden) → (tokens, hidden), fp32."""
        logits = (F.linear(h.to(self.head.dtype), self.head, self.bias).float() for h in states.split(self.size))
        return torch.cat([expected(self.weight, each) for each in logits])


def parts(module: PruningModule, at: Targets, states: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their final states (rows, hidden) as `states` gives them), so few rows that their logits fit."""
    size = _rows(module.student)
    for begin in range(0, len(at), size):
        rows = slice(begin, begin + size)
        yield rows, states(rows)


def nats(module: PruningModule, at: Targets, states: Callable[[slice], Tensor]) -> Tensor:
    """Sum over the tokens (one number, fp64), up to a constant, of final states."""
    student, total = module.student, torch.zeros((), dtype=torch.float64, device=module.device)
    for rows, h in parts(module, at, states):
        logits = student.logits(h.to(student.model.dtype)).float()
        total += (logits.logsumexp(-1) - (at.y[rows] * h).sum(-1)).sum(dtype=torch.float64)
    return total


def mean(nats: float, tokens: float) -> float:
    """Nats a token; infinite where that is not a number."""
    return math.inf if math.isnan(nats) else nats / tokens
