"""Perplexity over token windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from come_pl.decoder import Decoder
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
    nats, count = 0.0, 0
    starts = range(0, len(input_ids), batch_size)
    for begin in tqdm(starts, desc=title, disable=not progress, leave=False, unit="batch"):
        ids = input_ids[begin : begin + batch_size].to(device)
        real = mask[begin : begin + batch_size].to(device)
        attention = None if bool(real.all()) else real.long()
        losses = token_losses(decoder, decoder.run(ids, attention), ids, real)
        nats += float(losses.double().sum())
        count += int(targets_of(real).sum())
    mean = nats / max(count, 1)
    return Perplexity(math.exp(min(mean, 700.0)), mean, count)
