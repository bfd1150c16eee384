"""Taylor, and taylor+: drop the layers without which the loss would change least, all chosen at once (Shortened LLaMA,
arXiv 2402.02834).

    S = W ⊙ Σ_batches ∂L/∂W        a signed sum: batches may cancel
    layer score: of |S|, as `magnitude.py` has it of |W|; same reductions, same "+"

Defaults of the released code: p = 1, sum, sum; 10 windows of 128 tokens of BookCorpus.

The sum is exact, and only one layer's gradients (fp32) live at a time: the backward pass goes layer by layer from the
top, all batches through one layer before the next, from the streams kept at every boundary. That is one forward and one
backward pass in all, as with gradient checkpoints; without kept streams (`--model.cache none`) every layer runs those
below it again. With another number of processes or batch size sums have another order (fp32), and scores may
differ in their last digits.

Differs from the released code in: L is the mean over all predicted tokens, so that the score does not depend on the
batch size (there, a sum of batch means; CoMe's copy never clears gradients); and what `magnitude.py` lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from come_pl.offload import present
from come_pl.pruning.methods.magnitude import Magnitude, weights_of
from come_pl.pruning.module import PruningModule
from come_pl.taps import stream_at, token_losses


def attention_of(batch: dict[str, Any]) -> Tensor | None:
    """A batch's attention mask as autograd takes it: not one made in inference mode."""
    return None if batch["attention"] is None else batch["attention"].clone()


def gradient_at_top(module: PruningModule, index: int) -> Tensor:
    """Gradient (batch, seq, hidden) of a batch's summed loss, nats, in the stream after the last layer."""
    student, batch = module.student, module.batches[index]
    with torch.enable_grad():
        stream = module.stream(index, len(student)).clone().requires_grad_()
        hidden = student.run(batch["input_ids"], attention_of(batch), start=len(student), hidden=stream)
        loss = token_losses(student, hidden, batch["input_ids"], batch["mask"]).sum()
        return torch.autograd.grad(loss, stream)[0]


def gradients_below(
    module: PruningModule, layer: int, index: int, above: Tensor, weights: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Gradients of a batch's summed loss in a layer's weights, and in the stream (batch, seq, hidden) below the layer,
    from that in the stream `above` it. Layer 0 reads embeddings: below it there is none, and `above` is returned."""
    batch = module.batches[index]
    with torch.enable_grad():
        below = module.stream(index, layer).clone().requires_grad_()
        mask = attention_of(batch)
        output = stream_at(module.student, layer + 1, batch["input_ids"], mask, start=layer, hidden=below)
        above = above.to(output.device)
        *found, lower = torch.autograd.grad(output, [*weights, below], above, allow_unused=layer == 0)
    return found, above if lower is None else lower


class Taylor(Magnitude):
    """One-shot dropping by the first-order change of the loss."""

    needs = frozenset({"streams"})
    score_name = "taylor"

    def salience(self, module: PruningModule) -> Iterator[tuple[int, list[Tensor]]]:
        above = [gradient_at_top(module, index).cpu() for index in range(len(module.batches))]
        for layer in reversed(range(len(module.student))):
            with present(module.student.layers[layer]):  # in the backward pass too
                yield layer, self.layer_salience(module, layer, above)

    def layer_salience(self, module: PruningModule, layer: int, above: list[Tensor]) -> list[Tensor]:
        """Weight times gradient of each of a layer's weights; `above`, the gradients of each batch in the stream after
        the layer, become those below it."""
        weights = weights_of(module.student.layers[layer])
        sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        try:
            for weight in weights:
                weight.requires_grad_()
            for index in range(len(module.batches)):
                found, below = gradients_below(module, layer, index, above[index], weights)
                above[index] = below.cpu()  # where the streams are kept
                for total, gradient in zip(sums, found, strict=True):
                    total += gradient
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        gradients = [module.sum(total).to(total.device) / module.targets() for total in sums]
        return [w.detach().float() * gradient for w, gradient in zip(weights, gradients, strict=True)]


class TaylorPlus(Taylor):
    """Taylor with the first four layers and the last two held back."""

    def __init__(self, heuristic: bool = True, **options: Any):
        super().__init__(heuristic=heuristic, **options)
