"""The last repair: the gains of the final norm, so that the shallower model is as sure as its final states allow.

Regression in the layers below leaves final states that lean to the mean; what the head makes of them is fitted here.
With u the final norm's output (its bias β left out), W the head and one factor s_c a channel, logits are W (u ⊙ s + β),
and

    min over s   Σ_t  lse(W h_t) − y_t · h_t,     h_t = u_t ⊙ s + β,    y_t = (E_{v ~ teacher} W_v + W_{next token}) / 2

is the mean of the cross-entropies to the dense model's distribution and to the text: convex, with as many unknowns as
the model is wide. It is solved by Fisher scoring, s ← s − (F + λ d I)⁻¹ g, with the gradient g, F the mean outer
product of the next token's gradients, d its mean diagonal, and λ that of the least loss on windows that g and F have
not seen; a step that is no better there is not taken. No learning rate, no epochs. Processes exchange the tokens'
states and each solves the whole problem, so that what comes out does not depend on how many there are.

Not from a paper; temperature scaling (Guo et al., ICML 2017) is the case of one factor for all channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning.regression import folds_of, rounded_change
from come_pl.taps import logit_rows, targets_of

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

POSITIONS = 4096  # predicted tokens of all processes that are looked at, evenly spread, and up to twice as many
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
STEPS = 4


@dataclass
class _Positions:
    """Some predicted tokens: u (tokens, hidden), y (tokens, hidden), next token (tokens,), fp32 and ids."""

    u: Tensor
    y: Tensor
    following: Tensor


@torch.inference_mode()
def gains(module: PruningModule, folds: int, positions: int = POSITIONS) -> Tensor | None:
    """The final norm's new weight (hidden,), in its dtype; None where none is better on unseen windows.

    Args:
        folds: calibration windows are dealt into so many parts; the first is not fitted to.
        positions: at least so many predicted tokens are looked at, where there are as many, and fewer than twice that.
    """
    student, norm = module.student, module.student.final_norm
    if getattr(student.config, "final_logit_softcapping", None) is not None or norm.weight is None:
        return None
    seen, unseen = _positions(module, folds, positions)
    factor = seen.u.new_ones(seen.u.shape[1])
    if not len(seen.u) or not len(unseen.u):
        return None
    best = _loss(module, unseen, factor)
    start = best
    for _ in range(STEPS):
        gradient, fisher = _derivatives(module, seen, factor)
        diagonal, tried = fisher.diagonal().mean(), list[tuple[float, Tensor]]()
        for strength in STRENGTHS:
            damped = fisher.clone()
            damped.diagonal().add_(strength * diagonal)
            solved, failed = torch.linalg.solve_ex(damped, gradient)
            if not int(failed) and bool(solved.isfinite().all()):
                candidate = factor - rounded_change(solved[None])[0].to(factor)
                tried.append((_loss(module, unseen, candidate), candidate))
        loss, candidate = min(tried, key=lambda entry: entry[0], default=(math.inf, factor))
        if not loss < best:
            break
        best, factor = loss, candidate
    if best == start:
        return None
    offset = student.family.norm_offset
    return ((norm.weight.float() + offset) * factor.to(norm.weight.device) - offset).to(norm.weight.dtype)


def _positions(module: PruningModule, folds: int, positions: int) -> tuple[_Positions, _Positions]:
    """(what is fitted to, what is not), of all processes, window after window."""
    stride = max(1, math.floor(module.targets() / positions))
    head = module.student.model.get_output_embeddings().weight
    found: list[tuple[Tensor, ...]] = []  # of each window, filled up to as many rows as any has
    for number, batch in enumerate(module.batches):
        counted = targets_of(batch["mask"])
        picked = counted & ((counted.cumsum(1) - 1) % stride == 0)
        states = _normed(module.student, module.stream(number, len(module.student)))
        dense = module.teacher.final_norm(module.teacher_stream(number, len(module.teacher)))
        for window, fold in enumerate(folds_of(batch, folds)):
            rows = picked[window].nonzero().squeeze(1)
            following = batch["input_ids"][window, 1:][rows]
            y = 0.5 * _expected(module, dense[window, rows]) + 0.5 * head[following].float()
            group = torch.full_like(following, int(fold == 0))
            room = -(-counted.shape[1] // stride) - len(rows)
            filled = [F.pad(values, (0, 0, 0, room)) for values in (states[window, rows].float(), y)]
            found.append((*filled, F.pad(following, (0, room)), F.pad(group, (0, room), value=-1)))
    u, y, following, group = (_gathered(module, torch.stack(values)) for values in zip(*found, strict=True))
    seen, unseen = (_Positions(u[group == which], y[group == which], following[group == which]) for which in (0, 1))
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


def _expected(module: PruningModule, states: Tensor) -> Tensor:
    """The student's head (hidden,) in the mean over the teacher's next tokens, of its final states (tokens, hidden)."""
    head = module.student.model.get_output_embeddings().weight
    found = [head.new_zeros(0, head.shape[1], dtype=torch.float32)]
    for part in states.split(logit_rows(module.teacher, 2)):
        found.append((module.teacher.logits(part).float().softmax(-1).to(head.dtype) @ head).float())
    return torch.cat(found)


def _parts(module: PruningModule, at: _Positions, factor: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, h, fp32 logits) a few rows at a time."""
    head, bias = module.student.model.get_output_embeddings(), getattr(module.student.final_norm, "bias", None)
    size = logit_rows(module.student, 2)
    for begin in range(0, len(at.u), size):
        rows = slice(begin, begin + size)
        states = at.u[rows] * factor
        states = states if bias is None else states + bias.float()
        yield rows, states, head(states.to(head.weight.dtype)).float()


def _loss(module: PruningModule, at: _Positions, factor: Tensor) -> float:
    """Nats a token, up to a constant."""
    total = torch.zeros((), dtype=torch.float64, device=factor.device)
    for rows, states, logits in _parts(module, at, factor):
        total += (logits.logsumexp(-1) - (at.y[rows] * states).sum(-1)).sum(dtype=torch.float64)
    nats = float(total)
    return math.inf if math.isnan(nats) else nats / len(at.u)


def _derivatives(module: PruningModule, at: _Positions, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient (hidden,), F (hidden, hidden)), means over the tokens, fp64."""
    head, width = module.student.model.get_output_embeddings().weight, len(factor)
    sums = torch.zeros(width + 1, width, dtype=torch.float64, device=factor.device)
    for rows, _, logits in _parts(module, at, factor):
        expected = (logits.softmax(-1).to(head.dtype) @ head).float()
        sums[0] += (at.u[rows] * (expected - at.y[rows])).sum(0, dtype=torch.float64)
        own = at.u[rows] * (expected - head[at.following[rows]].float())
        sums[1:] += own.T @ own
    sums = sums / len(at.u)
    return sums[0], sums[1:]
