"""Concatenation in a repair: a layer that stands for several gets the MLP channels of theirs that matter most.

A student layer that stands for dense layers G has room for the MLP channels of one of them. With x what its MLP reads,
channel c of dense layer j ∈ G gives here, after one activation act, and with up_jc left out where the MLP has no gate,

    φ_jc = act(gate_jc · (I + Δ_j) x) (up_jc · (I + Δ_j) x)

Δ_j leads x towards what the MLP of layer j reads in the dense model, in least squares (`Refit.input_equations`), and is
folded into the weights. As many channels as a layer has are kept, those with the largest

    √(Σ_t w_t φ_jc(x_t)²) · ‖down_jc‖,   w_t = 1 / mean_c(T_tc²),   T the dense stream after G

and stand in the new layer in the order of their layers, each with its column of `down_proj`, for which a repair then
solves. Attention stays the layer's own.

The measure is CoMe's ("Layer as Puzzle Pieces", NeurIPS 2025: mean |φ| times the column's norm) but for the mean
square and the weights of tokens. That channels come from more than two layers at once, at the place of one of them, and
that their inputs are led back, is not from a paper. Removing channels by what each adds to the least squares (optimal
brain surgeon, from twice as many) was tried: 1 % better at 8,192 tokens of SmolLM2-135M, and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from come_pl.offload import present

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule
    from come_pl.pruning.regression import Fit

Parameters = dict[str, dict[str, Tensor]]  # of the layer's projections, by path and name


@dataclass
class Channels:
    """MLP channels of one dense layer, at the place of a student layer.

    Attributes:
        inputs: (weight (channels, hidden), bias or None) of each projection that the MLP reads with, Δ folded in.
        outputs: columns of `down_proj` (hidden, channels), in units of the student's stream.
    """

    inputs: list[tuple[Tensor, Tensor | None]]
    outputs: Tensor

    def only(self, rows: Tensor) -> Channels:
        """Some of them, with tensors of their own."""
        inputs = [(weight[rows], None if bias is None else bias[rows]) for weight, bias in self.inputs]
        return Channels(inputs, self.outputs[:, rows])


@torch.no_grad()  # no inference mode: what comes out becomes parameters
def concatenated(
    module: PruningModule,
    index: int,
    layers: Sequence[int],
    fit: Callable[[int, Callable[[int], Tensor]], Fit | None],
    weights: Callable[[int], Tensor],
) -> tuple[Parameters, dict[int, float]]:
    """The parameters of the MLP of student layer `index` with the most important channels of some dense layers, and the
    share that is kept of the channels of each of these.

    Args:
        layers: dense layers in ascending order.
        fit: (dense layer, what the student's MLP reads (batch, seq, hidden) of a batch) → Δ, or None for 0.
        weights: (batch, seq) of a batch, what each token counts for; 0 at padding.
    """
    student, path = module.student, module.student.family.mlp_inputs[0]
    held: dict[int, Tensor] = {}

    def reads(number: int) -> Tensor:
        if number in held:
            return held[number]
        x = module.reads(number, index, path)
        if module.in_memory:  # as much again as one boundary of the stream
            held[number] = x
        return x

    # of one layer at a time, as a model may be larger than memory
    fits = {layer: fit(layer, reads) for layer in layers}
    importance = [_importance(module, _channels(module, layer, led), reads, weights) for layer, led in fits.items()]
    width = student.geometry.ffn
    chosen = torch.cat(importance).topk(width).indices.sort().values
    rows = [chosen[chosen // width == place] - place * width for place in range(len(layers))]
    kept = [
        _channels(module, layer, led).only(row)
        for (layer, led), row in zip(fits.items(), rows, strict=True)
        if len(row)
    ]
    new: Parameters = {student.family.mlp_output: {"weight": torch.cat([channels.outputs for channels in kept], 1)}}
    for number, name in enumerate(student.family.mlp_inputs):
        parts = [channels.inputs[number] for channels in kept]
        new[name] = {"weight": torch.cat([weight for weight, _ in parts])}
        biases = [bias for _, bias in parts if bias is not None]
        if biases:
            new[name]["bias"] = torch.cat(biases)
    return new, {layer: len(row) / width for layer, row in zip(layers, rows, strict=True)}


def dense(module: PruningModule, index: int, source: int | None) -> Parameters:
    """What the MLP of dense layer `source` reads and writes with, in units of the student's stream, as far as student
    layer `index` has other values."""
    assert source is not None
    channels, family = _channels(module, source, None), module.student.family
    found: Parameters = {
        path: {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        for path, (weight, bias) in zip(family.mlp_inputs, channels.inputs, strict=True)
    }
    found[family.mlp_output] = {"weight": channels.outputs}
    return _others(module, index, found)


@torch.no_grad()
def read_by(module: PruningModule, source: int, index: int, paths: Sequence[str]) -> Parameters:
    """Weights of projections of dense layer `source`, as far as student layer `index` has others."""
    found: Parameters = {}
    for path in paths:
        projection = module.teacher.part(module.teacher.layers[source], path)
        with present(projection):
            found[path] = {"weight": projection.weight.clone()}
    return _others(module, index, found)


def _others(module: PruningModule, index: int, found: Parameters) -> Parameters:
    """What student layer `index` has otherwise."""
    other: Parameters = {}
    for path, values in found.items():
        projection = module.student.part(module.student.layers[index], path)
        with present(projection):
            now = {name: projection.get_parameter(name) for name in values}
            other[path] = {name: value for name, value in values.items() if not torch.equal(value, now[name])}
    return other


def _channels(module: PruningModule, layer: int, fit: Fit | None) -> Channels:
    teacher, family = module.teacher, module.teacher.family
    inputs = []
    for path in family.mlp_inputs:
        projection = teacher.part(teacher.layers[layer], path)
        with present(projection):
            weight = projection.weight if fit is None else fit.before(projection)["weight"]
            inputs.append((weight.clone(), projection.bias))
    projection = teacher.part(teacher.layers[layer], family.mlp_output)
    with present(projection):
        outputs = (projection.weight.float() * module.record.scale_at(layer + 1)).to(projection.weight.dtype)
    return Channels(inputs, outputs)


def _importance(
    module: PruningModule, channels: Channels, reads: Callable[[int], Tensor], weights: Callable[[int], Tensor]
) -> Tensor:
    """(channels,) fp64, rounded: the order in which windows and processes were added leaves no trace."""
    total = torch.zeros(channels.outputs.shape[1], dtype=torch.float64, device=module.device)
    for number in range(len(module.batches)):
        counts = weights(number)
        for window, x in enumerate(reads(number)):
            values = module.student.mlp_channels(x, channels.inputs).float().square()
            values = torch.where(counts[window][:, None] > 0, values * counts[window][:, None], 0.0)
            total += values.sum(0).double()
    found = module.sum(total).to(channels.outputs.device).sqrt() * channels.outputs.double().norm(dim=0)
    mantissa, exponent = torch.frexp(found)
    return torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)
