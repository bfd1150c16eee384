"""FuseGPT's adapters: one layer's weights as a learned addition to its neighbours', until they are folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from come_pl.decoder import Decoder
from come_pl.offload import copied, present


class Fusion(nn.Module):
    """W → W + B A + (C₁ C₂) ⊙ W_f, all (out, in); the ranks are cut to the smaller side."""

    fused: Tensor
    A: Tensor
    B: Tensor
    C1: Tensor
    C2: Tensor

    def __init__(self, fused: Tensor, ranks: tuple[int, int], order: torch.Generator):
        super().__init__()
        self.register_buffer("fused", fused.detach())
        (rows, columns), least = fused.shape, min(fused.shape)
        for left, right, rank in (("B", "A", ranks[0]), ("C1", "C2", ranks[1])):
            rank = min(rank, least)
            start = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5), generator=order)
            setattr(self, left, nn.Parameter(torch.zeros(rows, rank, device=fused.device)))
            setattr(self, right, nn.Parameter(start.to(fused.device)))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            change = self.B @ self.A + (self.C1 @ self.C2) * self.fused.float()
            return (weight.float() + change).to(weight.dtype)


def fusible(
    student: Decoder, group: Iterable[int], fused: int, ranks: tuple[int, int], order: torch.Generator
) -> nn.ModuleDict:
    """Copies of the layers of `group` by place, without layer `fused`, whose weights are fused into their linear maps.

    What requires a gradient is A, B, C₁, C₂ and, in fp32, the norms.

    Args:
        ranks: of B A and of C₁ C₂.
        order: random numbers of A and C₂.
    """
    net = nn.ModuleDict()
    for place in group:
        if place == fused:
            continue
        layer = copied(student.layers[place], student.config).requires_grad_(False)
        for path, part in list(layer.named_modules()):
            if isinstance(part, nn.Linear):
                weight = student.part(student.layers[fused], path).weight
                with present(weight):
                    register_parametrization(part, "weight", Fusion(weight, ranks, order))
            elif next(part.parameters(recurse=False), None) is not None:  # a norm
                part.float().requires_grad_(True)
        net[str(place)] = layer
    return net


def folded(student: Decoder, layers: Mapping[int, nn.Module], fused: int) -> dict[str, Tensor]:
    """Plain weights of what was trained in `layers`, by their places after layer `fused` of `student` is gone."""
    found = {}
    for place, layer in layers.items():
        for name, old in student.layers[place].named_parameters():
            owner, _, attribute = name.rpartition(".")
            part = layer.get_submodule(owner)
            if not isinstance(part, nn.Linear) or attribute == "weight":
                found[f"{place - (place > fused)}.{name}"] = getattr(part, attribute).detach().to(old.dtype)
    return found
