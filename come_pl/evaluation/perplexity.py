"""Perplexity over token windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from come_pl.decoder import Decoder, attention_mask
from come_pl.taps import targets_of, token_losses


@dataclass(frozen=True)
class Perplexity:
    """Perplexity exp(nats / predicted tokens) of a text.

    Attributes:
        token: perplexity per predicted token.
        nats: mean negative log-likelihood per predicted token.
        tokens: number of predicted tokens; the first of each window is not predicted.
    """

    token: float
    nats: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


@torch.inference_mode()
def perplexity(
    model: Any, input_ids: Tensor, mask: Tensor, *, batch_size: int = 4, title: str = "", progress: bool = True
) -> Perplexity:
    """Perplexity of a causal LM on windows (windows, seq), each read on its own, on the device that the model is on.

    Args:
        mask: (windows, seq), False where a token is padding: it is neither read nor predicted.
        title: shown beside the progress bar.
    """
    decoder = Decoder(model)
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)  # read once, at the end
    count = int(targets_of(mask).sum())
    starts = range(0, len(input_ids), batch_size)
    for begin in tqdm(starts, desc=title, disable=not progress, leave=False, unit="batch"):
        ids, real = input_ids[begin : begin + batch_size].to(device), mask[begin : begin + batch_size]
        attention = attention_mask(real)
        hidden = decoder.run(ids, None if attention is None else attention.to(device))
        nats += token_losses(decoder, hidden, ids, real.to(device)).sum(dtype=torch.float64)
    mean = float(nats) / max(count, 1)
    return Perplexity(math.exp(min(mean, 700.0)), mean, count)
