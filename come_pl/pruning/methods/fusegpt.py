"""FuseGPT: a layer that the output hardly needs is fused into its neighbours, which are trained to make up for it.

    f       = argmax_l mean_t cos(h_L, h_L without layer l)                     (macro influence, before the final norm)
    group   = 8 layers around f: f − 4 … f + 3, moved inside the model
    W_t     ← W_t + B A + (C₁ C₂) ⊙ W_f    for every linear map of every other layer t of the group; at first B = C₁ = 0
    loss    KL(softmax(target) ‖ softmax(output)) of the group's output stream, target: the group's before the step

Repeated until the depth is reached, always from the current model (arXiv 2411.14507). Only A, B, C₁, C₂ and the norms
are trained, and everything is folded into plain weights. Defaults of the released code: rank 128 for both, group 8,
Adam with betas .9/.95, lr 1e-3 for C and 9.65e-6 for the rest on a cosine, 20 epochs, influence on 32 windows.

Trained by a LightningModule in a Trainer of its own inside the run's, see training.py.

Differs from the released code in: the softmax is over channels (`kl_dim` −1; there over the windows of a batch, dim 0,
almost certainly a slip) and the loss then a mean over tokens; layers are folded after each step (there, a layer that is
fused once more keeps its adapters until then); any model (there, names with 7b or 13b).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from come_pl.pruning.batches import inputs_of
from come_pl.pruning.methods.base import Decision, Method
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import rounded
from come_pl.pruning.methods.fusion import folded, fusible
from come_pl.pruning.methods.training import fit, generator, run_layers, usable
from come_pl.record import Record, Step
from come_pl.taps import stream_at

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule


def divergence(output: Tensor, target: Tensor, mask: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(KL(softmax(target) ‖ softmax(output)) summed over what counts, its number): streams (batch, seq, hidden), over
    channels (`dim` −1, counted in tokens) or over the windows of a batch (0, counted in windows)."""
    output, target, counted = output.float(), target.float(), mask[..., None]
    if dim == 0:
        output, target = (x.masked_fill(~counted, -1e30) for x in (output, target))
    each = F.kl_div(output.log_softmax(dim), target.softmax(dim), reduction="none")
    return each.where(counted, 0.0).sum(), mask.sum() if dim == -1 else mask.any(1).sum()


class FuseGPT(Method):
    """FuseGPT: the least needed layer is fused into its group by learned coefficients, one layer a step.

    Args:
        group_size: Layers of a group, the fused one included.
        epochs: Passes over the calibration windows after each fusion; 0 drops the layer and changes nothing else.
        coef_rank: Rank of the coefficients of the fused weights.
        lora_rank: Rank of what is learned beside them.
        coef_lr: Learning rate of the coefficients.
        lr: Learning rate of everything else.
        kl_dim: Dimension of the loss's softmax: -1 (channels) or 0 (windows of a batch, as released).
        windows: Calibration windows that the influence is measured on, rounded up to whole batches; all without it.
    """

    needs = frozenset({"streams"})
    progressive = True

    def __init__(
        self,
        group_size: int = 8,
        epochs: int = 20,
        coef_rank: int = 128,
        lora_rank: int = 128,
        coef_lr: float = 1e-3,
        lr: float = 9.65e-6,
        kl_dim: Literal[-1, 0] = -1,
        windows: int | None = 32,
    ):
        check(group_size=(group_size, 2), epochs=(epochs, 0), coef_rank=(coef_rank, 1), lora_rank=(lora_rank, 1))
        check(coef_lr=(coef_lr, 0), lr=(lr, 0), kl_dim=(kl_dim, Literal[-1, 0]), windows=(windows, 1))
        self.group_size, self.epochs, self.coef_rank, self.lora_rank = group_size, epochs, coef_rank, lora_rank
        self.writes = group_size if epochs else 0
        self.coef_lr, self.lr, self.kl_dim, self.windows = coef_lr, lr, kl_dim, windows

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        if self.kl_dim == 0 and self.epochs and all(len(batch["mask"]) == 1 for batch in module.batches):
            raise ValueError("kl_dim 0 compares the windows of a batch: it needs a --data.batch_size above 1")
        influence = self.influence(module)
        fused = min(range(len(influence)), key=lambda layer: influence[layer])
        step = Step("drop", [fused], scores={"macro_influence": list(influence)})
        if self.epochs:
            first = max(min(fused - self.group_size // 2, record.layers - self.group_size), 0)
            group = range(first, min(first + self.group_size, record.layers))
            step.weights, losses = self.fuse(module, group, fused, record)
            step.scores["training_loss"] = list(losses)
        return Decision(step)

    @torch.inference_mode()
    def influence(self, module: PruningModule) -> list[float]:
        """1 − mean cosine of the stream before the final norm with and without each layer."""
        student, depth = module.student, len(module.student)
        sums = torch.zeros(depth + 1, dtype=torch.float64, device=module.device)
        for index in module.first_batches(self.windows):
            batch = module.batches[index]
            tokens, mask, final = inputs_of(batch), batch["mask"], module.stream(index, depth)
            for layer in range(depth):
                without = stream_at(student, depth, *tokens, start=layer + 1, hidden=module.stream(index, layer))
                sums[layer] += (1 - F.cosine_similarity(final.float(), without.float(), dim=-1))[mask].double().sum()
            sums[-1] += mask.sum()
        found = module.sum(sums)
        return [rounded(value) for value in (found[:-1] / found[-1].clamp(min=1)).tolist()]

    def fuse(
        self, module: PruningModule, group: range, fused: int, record: Record
    ) -> tuple[dict[str, Tensor], list[float]]:
        """(weights of the group's layers by their places after layer `fused` is gone, mean loss of each epoch)."""
        student, order = module.student, generator(record)
        net = fusible(student, group, fused, (self.lora_rank, self.coef_rank), order)
        layers = {int(place): layer for place, layer in net.items()}

        def loss(index: int) -> tuple[Tensor, Tensor]:
            batch, target = usable(module.batches[index]), module.stream(index, group.stop).clone()
            output = run_layers(student, layers, batch, module.stream(index, group.start).clone())
            return divergence(output, target, batch["mask"], self.kl_dim)

        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        coefficients = [p for name, p in trained.items() if name.endswith((".C1", ".C2"))]
        rest = [p for name, p in trained.items() if not name.endswith((".C1", ".C2"))]
        rates = [{"params": coefficients, "lr": self.coef_lr}, {"params": rest, "lr": self.lr}]
        losses = fit(module, net, loss, torch.optim.Adam(rates, betas=(0.9, 0.95)), epochs=self.epochs, order=order)
        return folded(student, layers, fused), losses
