"""What a run of a method costs, counted and not timed: passes through the decoder layers and through the head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from come_pl.decoder import Decoder


@dataclass
class Cost:
    """Forwards seen, and what a full pass is.

    Attributes:
        depth: decoder layers of the dense model.
        tokens: calibration tokens.
        layer_tokens: tokens that went through a decoder layer, summed over layers.
        head_tokens: tokens that went through the output embeddings.
        layer_runs: forwards of decoder layers, of any batch.
    """

    depth: int
    tokens: int
    layer_tokens: int = 0
    head_tokens: int = 0
    layer_runs: int = 0

    @property
    def passes(self) -> float:
        """Full-pass equivalents: runs of every decoder layer of the dense model over all calibration tokens."""
        return self.layer_tokens / (self.depth * self.tokens)

    @property
    def head_passes(self) -> float:
        """Runs of the head over all calibration tokens."""
        return self.head_tokens / self.tokens


@contextlib.contextmanager
def counted(model: Any, tokens: int) -> Iterator[Cost]:
    """Counts every forward of a decoder layer and of a head like those of `model`, whichever model it belongs to:
    candidates and copies count as the student does."""
    decoder = Decoder(model)
    kind, vocabulary = type(decoder.layers[0]), model.get_output_embeddings().weight.shape[0]
    cost = Cost(len(decoder), tokens)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module) is kind:
            cost.layer_tokens += args[0].shape[0] * args[0].shape[1]
            cost.layer_runs += 1
        elif isinstance(module, nn.Linear) and module.out_features == vocabulary:
            cost.head_tokens += args[0].numel() // args[0].shape[-1]

    handle = register_module_forward_pre_hook(before)
    try:
        yield cost
    finally:
        handle.remove()
