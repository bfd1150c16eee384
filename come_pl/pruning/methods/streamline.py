"""LLM-Streamline: a window of layers that hardly turns the stream is replaced by one trained layer (ICLR 2025).

    window  i … i+n (n + 1 layers, to remove n) with the highest mean cos(h_i, h_{i+n+1}) over all tokens
    net     = one decoder layer, from layer i's weights, in the window's place
    mse     Σ_t ‖net(h_i) − h_{i+n+1}‖² / (tokens · hidden), from the streams of the model before the step
    lm      next-token loss of the whole pruned model; only the net is trained (better, and more work)

h_l is the stream before layer l. Defaults of the released code: AdamW, lr 2e-4 down to 5e-5 on a cosine, weight decay
1e-3, betas .9/.999 (lm: .9/.95), gradients clipped to norm 5, 1 epoch over 0.06 billion tokens in batches of 128
windows; here the calibration windows, one step a batch, 10 epochs.

Trained by a LightningModule in a Trainer of its own inside the run's, see training.py.

Differs from the released code in: streams are read batch by batch (there, those of the whole corpus are kept, a
terabyte for a 7B model); the last window ends before the final norm; the learning rate reaches its end; the weights
after the last step are kept (there, the best of a validation set).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from come_pl.offload import copied
from come_pl.pruning.batches import inputs_of
from come_pl.pruning.methods.base import Decision, Method
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import rounded
from come_pl.pruning.methods.training import fit, generator, run_layers, usable
from come_pl.record import Record, Step
from come_pl.taps import boundaries, targets_of, token_losses

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

Loss = Literal["mse", "lm"]


@torch.inference_mode()
def cosine_distances(module: PruningModule, span: int) -> list[float]:
    """Mean over all tokens of 1 − cos(h_l, h_{l+span}) of the student, for each l; one pass over the windows."""
    sums = torch.zeros(len(module.student) - span + 2, dtype=torch.float64, device=module.device)
    for batch in module.batches:
        with boundaries(module.student) as found:
            module.student.run(*inputs_of(batch))
        units = {boundary: F.normalize(stream[batch["mask"]].float(), dim=-1) for boundary, stream in found.items()}
        for site in range(len(sums) - 1):
            sums[site] += (units[site] - units[site + span]).double().square().sum() / 2  # exact where cos is near 1
        sums[-1] += batch["mask"].sum()
    total = module.sum(sums)
    return [rounded(value) for value in (total[:-1] / total[-1]).tolist()]


class Streamline(Method):
    """LLM-Streamline: one trained layer for the window that turns the stream least.

    Args:
        loss: What the layer is trained by: mse (the stream after the window) or lm (the next token).
        epochs: Passes over the calibration windows; 0 leaves the window's first layer as it is.
        lr: Learning rate at the start; a quarter of it at the end.
        weight_decay: AdamW's.
        clip: Largest norm of the gradients.
    """

    needs = frozenset({"streams"})
    writes = 1

    def __init__(
        self,
        loss: Loss = "mse",
        epochs: int = 10,
        lr: float = 2e-4,
        weight_decay: float = 1e-3,
        clip: float = 5.0,
    ):
        check(loss=(loss, Loss), epochs=(epochs, 0), lr=(lr, 0), weight_decay=(weight_decay, 0), clip=(clip, 0))
        self.loss, self.epochs, self.lr, self.weight_decay, self.clip = loss, epochs, lr, weight_decay, clip

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        distances = cosine_distances(module, remove + 1)
        first = min(range(len(distances)), key=lambda site: distances[site])
        window = list(range(first, first + remove + 1))
        step = Step("blend", window, [1.0] + [0.0] * remove, norm="first", scores={"window_distance": list(distances)})
        if self.epochs:
            net = copied(module.student.layers[first], module.student.config).float().requires_grad_(True)
            step.scores["training_loss"] = list(self.train(module, net, window, record))
            dense = dict(module.student.layers[first].named_parameters())
            trained = {name: parameter.detach().to(dense[name].dtype) for name, parameter in net.named_parameters()}
            step.weights = {f"{first}.{name}": parameter for name, parameter in trained.items()}
        return Decision(step)

    def train(self, module: PruningModule, net: nn.Module, window: list[int], record: Record) -> list[float]:
        """Trains `net` to stand for the window; the mean loss of each epoch."""
        student, first = module.student, window[0]

        def mse(index: int) -> tuple[Tensor, Tensor]:
            batch, target = usable(module.batches[index]), module.stream(index, window[-1] + 1).clone()
            output = run_layers(student, {first: net}, batch, module.stream(index, first).clone())
            error = (output.float() - target.float())[batch["mask"]].square()
            return error.sum(), torch.tensor(error.numel(), device=error.device)

        def lm(index: int) -> tuple[Tensor, Tensor]:
            batch, hidden = usable(module.batches[index]), module.stream(index, first).clone()
            final = student.run(*inputs_of(batch), start=first, hidden=hidden, swap={first: net}, skip=window[1:])
            losses = token_losses(student, final, batch["input_ids"], batch["mask"])
            return losses.sum(), targets_of(batch["mask"]).sum()

        betas = (0.9, 0.999 if self.loss == "mse" else 0.95)
        optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=betas)
        loss, order = (mse if self.loss == "mse" else lm), generator(record)
        return fit(module, net, loss, optimizer, epochs=self.epochs, order=order, floor=0.25, clip=self.clip or None)
