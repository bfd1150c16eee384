"""Perplexity over token windows, and what goes with it: per word, against a dense model, with strided windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from come_pl.decoder import Decoder, attention_mask
from come_pl.taps import losses_and_divergences, targets_of, token_losses


class BadWindows(ValueError):
    """Settings that make no windows; the message is one line that says what to do."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity exp(nats / predicted tokens) of a text.

    Attributes:
        token: perplexity per predicted token.
        nats: mean negative log-likelihood per predicted token.
        tokens: number of predicted tokens; the first of each window is not predicted.
        kl: mean KL(dense ‖ model) of the predictions, nats a token; None without a dense model.
    """

    token: float
    nats: float
    tokens: int
    kl: float | None = None

    def word(self, tokens: int, words: int) -> float:
        """Perplexity per word of a text of so many tokens and words: exp(nats a token × tokens a word)."""
        return _exp(self.nats * tokens / max(words, 1))

    def to_dict(self) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


@torch.inference_mode()
def perplexity(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    *,
    counted: Tensor | None = None,
    dense: Any = None,
    batch_size: int = 4,
    title: str = "",
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a causal LM on windows (windows, seq), each read on its own, on the device that the model is on.

    Args:
        mask: (windows, seq), False where a token is padding: it is neither read nor predicted.
        counted: (windows, seq), False where a token is read but its prediction does not count; all count without it.
        dense: a model of the same vocabulary on the same device, to tell the KL divergence from.
        title: shown beside the progress bar.
    """
    decoder = Decoder(model)
    teacher = None if dense is None else Decoder(dense)
    device = next(model.parameters()).device
    nats, divergence = torch.zeros(2, dtype=torch.float64, device=device)  # read once, at the end
    predicted = targets_of(mask) if counted is None else targets_of(mask) & counted[:, 1:]
    count = int(predicted.sum())
    starts = range(0, len(input_ids), batch_size)
    for begin in tqdm(starts, desc=title, disable=not progress, leave=False, unit="batch"):
        ids, real = input_ids[begin : begin + batch_size].to(device), mask[begin : begin + batch_size]
        attention = attention_mask(real)
        attention = None if attention is None else attention.to(device)
        wanted = predicted[begin : begin + batch_size].to(device)
        hidden = decoder.run(ids, attention)
        if teacher is None:
            losses = token_losses(decoder, hidden, ids, real.to(device))
        else:
            theirs = teacher.run(ids, attention)
            losses, kl = losses_and_divergences(decoder, hidden, teacher, theirs, ids, real.to(device))
            divergence += kl[:, :-1].where(wanted, 0.0).sum(dtype=torch.float64)
        nats += losses.where(wanted, 0.0).sum(dtype=torch.float64)
    mean = float(nats) / max(count, 1)
    return Perplexity(_exp(mean), mean, count, None if teacher is None else float(divergence) / max(count, 1))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def strided(stream: Tensor, seqlen: int, stride: int, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping windows of a text, `stride` tokens apart: ids, mask and counted, each (windows, seqlen).

    Each token is counted once, in the first window that reads it, so that all but the first window's predictions have
    at least seqlen − stride tokens before them.

    Args:
        stream: (tokens,) of one text.
        first: BOS, put in front of each window.

    Raises:
        BadWindows: a stride that skips tokens.
    """
    body = seqlen - (first is not None)
    if not 1 <= stride <= body:
        raise BadWindows(f"stride {stride}: expected from 1 to {body}, the tokens of text in a window")
    count = 1 + max(0, -(-(len(stream) - body) // stride))
    ids = torch.zeros(count, body, dtype=torch.long)
    mask, counted = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    done = 0
    for row in range(count):
        piece = stream[row * stride : row * stride + body]
        ids[row, : len(piece)] = piece
        mask[row, : len(piece)] = True
        counted[row, done - row * stride : len(piece)] = True
        done = row * stride + len(piece)
    if first is not None:
        ids = torch.cat([torch.full_like(ids[:, :1], first), ids], 1)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        counted = torch.cat([torch.zeros_like(counted[:, :1]), counted], 1)
    return ids, mask, counted
