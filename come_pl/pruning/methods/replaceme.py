"""ReplaceMe: a block of layers becomes one linear map, folded into the MLP before it (arXiv 2505.02819).

    block   i+1 … i+n with the least mean arccos(cos(h_{i+1}, h_{i+n+1})) / π over the last token of each window
    M       = MLP output of layer i,  Y = its stream before that is added:  h_{i+1} = Y + M
    T       = argmin_T ‖M T − (h_{i+n+1} − Y)‖² + α s ‖T‖²   (least_squares; s = mean diagonal of MᵀM), or
              argmin_T mean 1 − cos(M T, h_{i+n+1} − Y)   (cosine; Adam from T = 1)
    fold    W ← Tᵀ W,  b ← Tᵀ b  of layer i's down_proj; layers i+1 … i+n are dropped

h_l is the stream before layer l. Nothing is added to the model. Defaults of the released code: α = 0; for cosine Adam
with lr 1e-4, 10 epochs, batches of 1024 tokens of 8000 dialogues.

Differs from the released code in: padding is left out of the fit; normal equations in fp64, summed over the text, are
all that is kept; activations are the model's own (there, those of a 4-bit copy); an Adam step is a calibration batch,
of which there are far fewer here, hence lr 1e-3; one block a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from come_pl.offload import present
from come_pl.pruning.batches import inputs_of
from come_pl.pruning.methods.base import Decision, Method, NoSite
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.shortgpt import angular_distances
from come_pl.pruning.methods.training import fit, generator
from come_pl.record import Record, Step
from come_pl.taps import layer_run

if TYPE_CHECKING:
    from come_pl.decoder import Family
    from come_pl.pruning.module import PruningModule

Solver = Literal["least_squares", "cosine"]


@torch.inference_mode()
def pairs(module: PruningModule, index: int, before: int, count: int) -> tuple[Tensor, Tensor]:
    """(M, h_{i+n+1} − Y), both (tokens, hidden) fp32 over the counted tokens of batch `index`; i = `before`, n =
    `count`."""
    student, batch = module.student, module.batches[index]
    path, mask = student.family.mlp_output, batch["mask"]
    hidden = module.stream(index, before)
    output, x = layer_run(student, before, path, *inputs_of(batch), hidden)
    with student.mixed():
        m = student.part(student.layers[before], path)(x)
    m = m[mask].float()
    return m, module.stream(index, before + count + 1)[mask].float() - output[mask].float() + m


class ReplaceMe(Method):
    """ReplaceMe: all layers to be removed are one block, stood for by a linear map inside the layer before it.

    Args:
        solver: How the map is found: least_squares (in closed form) or cosine (Adam).
        ridge: Weight of the map's own size in the least squares, in units of the mean square of the MLP's outputs.
        lr: Learning rate of the cosine.
        epochs: Passes of the cosine over the calibration windows.
    """

    needs = frozenset({"streams"})
    writes = 1

    def __init__(self, solver: Solver = "least_squares", ridge: float = 0.0, lr: float = 1e-3, epochs: int = 10):
        check(solver=(solver, Solver), ridge=(ridge, 0), lr=(lr, 0), epochs=(epochs, 0))
        self.solver, self.ridge, self.lr, self.epochs = solver, ridge, lr, epochs

    @property
    def by_batches(self) -> bool:
        return self.solver == "cosine" and self.epochs > 0

    def check(self, family: Family, layers: int, remove: int) -> None:
        if not family.linear_outputs:
            raise ValueError(
                f"replaceme is not possible for {family.name}: a norm stands between its MLP's output projection and "
                "the stream, so that no linear map can be folded into it"
            )
        if layers < remove + 1:
            raise NoSite(f"a layer must stay before the {remove} that are dropped, of {layers}")

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        student, path = module.student, module.student.family.mlp_output
        self.check(student.family, record.layers, remove)
        distances = angular_distances(module, remove)
        cut = min(range(1, len(distances)), key=lambda site: distances[site])  # layer 0 has no layer before it
        matrix = (self.least_squares if self.solver == "least_squares" else self.cosine)(module, cut - 1, remove)
        step = Step("drop", list(range(cut, cut + remove)), scores={"angular_distance": [None, *distances[1:]]})
        projection = student.part(student.layers[cut - 1], path)
        fold = matrix.T.to(projection.weight.device)
        with present(projection):
            step.weights = {
                f"{cut - 1}.{path}.{name}": (fold @ parameter.detach().double()).to(parameter.dtype)
                for name, parameter in projection.named_parameters()
            }
        return Decision(step)

    def least_squares(self, module: PruningModule, before: int, count: int) -> Tensor:
        """T (hidden, hidden), fp64 on the CPU; the smallest of all solutions where tokens are too few for one."""
        width = module.student.geometry.hidden
        sums = torch.zeros(2, width, width, dtype=torch.float64, device=module.device)
        for index in range(len(module.batches)):
            m, target = (x.double() for x in pairs(module, index, before, count))
            sums[0] += m.T @ m
            sums[1] += m.T @ target
        a, b = module.sum(sums)
        a.diagonal().add_(self.ridge * a.diagonal().mean())
        return torch.linalg.lstsq(a, b, rcond=1e-13, driver="gelsd").solution

    def cosine(self, module: PruningModule, before: int, count: int) -> Tensor:
        """T (hidden, hidden), fp64 on the CPU."""
        net = nn.Linear(module.student.geometry.hidden, module.student.geometry.hidden, bias=False)
        nn.init.eye_(net.weight)

        def loss(index: int) -> tuple[Tensor, Tensor]:
            m, target = (x.clone() for x in pairs(module, index, before, count))
            distance = 1 - F.cosine_similarity(net(m), target, dim=-1)
            return distance.sum(), torch.tensor(len(m), device=m.device)

        optimizer = torch.optim.Adam(net.parameters(), lr=self.lr)
        options = {"epochs": self.epochs, "order": generator(module.record), "floor": 1.0, "precision": "32-true"}
        fit(module, net, loss, optimizer, **options)  # type: ignore[arg-type]
        return net.weight.detach().T.double()
