"""The last repair: the gains of the final norm, so that the shallower model is as sure as its final states allow.

Regression in the layers below leaves final states that lean to the mean; what the head makes of them is fitted here.
With u the final norm's output (its bias β left out), W the head and one factor s_c a channel, logits are W (u ⊙ s + β),
and

    min over s   Σ_t  lse(W h_t) − y_t · h_t,     h_t = u_t ⊙ s + β

is the mean of the cross-entropies to the dense model's distribution and to the text (`head.py`): convex, with as many
unknowns as the model is wide. It is solved by Fisher scoring, s ← s − (F + λ d I)⁻¹ g, with the gradient g, F the mean
outer product of the next token's gradients, d its mean diagonal, and λ that of the least loss on windows that g and F
have not seen; a step that is no better there is not taken. No learning rate, no epochs.

Not from a paper; temperature scaling (Guo et al., ICML 2017) is the case of one factor for all channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning import head
from come_pl.pruning.head import Targets
from come_pl.pruning.regression import folds_of
from come_pl.taps import targets_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from come_pl.pruning.module import PruningModule

POSITIONS = 4096  # predicted tokens of all processes that are looked at, evenly spread, and up to twice as many
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
STEPS = 4


@dataclass
class Positions(Targets):
    """Some predicted tokens.

    Attributes:
        u: (tokens, hidden), fp32.
    """

    u: Tensor


@torch.no_grad()  # no inference mode: what comes out becomes a parameter
def gains(module: PruningModule, folds: int, positions: int = POSITIONS) -> Tensor | None:
    """The final norm's new weight (hidden,), in its dtype; None where none is better on unseen windows.

    Args:
        folds: calibration windows are dealt into so many parts; the first is not fitted to.
        positions: at least so many predicted tokens are looked at, where there are as many, and fewer than twice that.
    """
    student, norm = module.student, module.student.final_norm
    if not head.predictable(module) or norm.weight is None:
        return None
    seen, unseen = _positions(module, folds, positions)
    if not len(seen) or not len(unseen):
        return None
    factor = head.newton(
        seen.y.new_ones(seen.y.shape[1]),
        lambda factor: _loss(module, unseen, factor),
        lambda factor: _step(*_derivatives(module, seen, factor)),
        STRENGTHS,
        0.1,
        STEPS,
    )
    if factor is None:
        return None
    offset = student.family.norm_offset
    return ((norm.weight.float() + offset) * factor.to(norm.weight.device) - offset).to(norm.weight.dtype)


def _step(gradient: Tensor, fisher: Tensor) -> Callable[[float], Tensor]:
    """λ → (F + λ d I)⁻¹ g; not finite where that cannot be solved for."""

    def solved(strength: float) -> Tensor:
        damped = fisher.clone()
        damped.diagonal().add_(strength * fisher.diagonal().mean())
        found, failed = torch.linalg.solve_ex(damped, gradient)
        return found if not int(failed) else torch.full_like(found, math.inf)

    return solved


@torch.inference_mode()
def _positions(module: PruningModule, folds: int, least: int) -> tuple[Positions, Positions]:
    """(what is fitted to, what is not), of all processes, window after window: they exchange the tokens, and each
    solves the whole problem, so that what comes out does not depend on how many there are."""
    stride, left_out = max(1, math.floor(module.targets() / least)), module.unseen_fold(folds)
    found: list[tuple[Tensor, Tensor, Tensor, int, int]] = []  # of each window
    for number, batch in enumerate(module.batches):
        counted = targets_of(batch["mask"])
        picked = counted & ((counted.cumsum(1) - 1) % stride == 0)
        u = _normed(module.student, module.stream(number, len(module.student)))
        dense = module.teacher.final_norm(module.teacher_stream(number, len(module.teacher)))
        for window, fold in enumerate(folds_of(batch, folds)):
            rows = picked[window].nonzero().squeeze(1)
            room = -(-counted.shape[1] // stride) - len(rows)  # to as many rows as any has
            following = batch["input_ids"][window, 1:][rows]
            found.append((dense[window, rows], u[window, rows].float(), following, int(fold == left_out), room))
    targets, own = head.targets(module), [each[2] for each in found]
    whole = targets(torch.cat([each[0] for each in found]), torch.cat(own)).split([len(rows) for rows in own])
    filled = []
    for y, (_, u, following, fold, room) in zip(whole, found, strict=True):
        groups = torch.full_like(following, fold)
        states = [F.pad(value, (0, 0, 0, room)) for value in (y, u)]
        filled.append((*states, F.pad(following, (0, room)), F.pad(groups, (0, room), value=-1)))
    y, u, following, group = (_gathered(module, torch.stack(values)) for values in zip(*filled, strict=True))
    seen, unseen = (Positions(y[group == which], following[group == which], u[group == which]) for which in (0, 1))
    return seen, unseen


def _gathered(module: PruningModule, own: Tensor) -> Tensor:
    """Windows (windows, rows, …) of all processes in the order of the text, which deals them out in turn, as one
    (tokens, …)."""
    if module.world > 1:
        own = module.all_gather(own).transpose(0, 1).flatten(0, 1)  # type: ignore[union-attr]
    return own.flatten(0, 1)


def _normed(decoder: Decoder, stream: Tensor) -> Tensor:
    """The final norm's output without its bias."""
    bias = getattr(decoder.final_norm, "bias", None)
    states = decoder.final_norm(stream)
    return states if bias is None else states - bias


def _states(module: PruningModule, at: Positions, factor: Tensor) -> Callable[[slice], Tensor]:
    bias = getattr(module.student.final_norm, "bias", None)
    return lambda rows: at.u[rows] * factor + (0.0 if bias is None else bias.float())


def _loss(module: PruningModule, at: Positions, factor: Tensor) -> float:
    """Nats a token, up to a constant."""
    return head.mean(float(head.nats(module, at, _states(module, at, factor))), len(at))


def _derivatives(module: PruningModule, at: Positions, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient (hidden,), F (hidden, hidden)), means over the tokens, fp64."""
    weight = module.student.model.get_output_embeddings().weight
    expected = head.Expected(module.student, weight)(_states(module, at, factor)(slice(None)))
    own = at.u * (expected - weight[at.following].float())
    gradient = (at.u * (expected - at.y)).sum(0, dtype=torch.float64)
    return gradient / len(at), (own.T @ own).double() / len(at)
