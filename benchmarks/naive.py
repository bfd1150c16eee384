"""CoMe, CoMe-P and SLEB with the arithmetic of the released code, to compare time and memory with.

Written from the description in words (no line of that code is here), without its defects that change a choice, so that
both sides decide the same and only the cost differs:

* statistics: a forward of the whole causal LM, head included, over every calibration window in every step. The streams
  and the inputs of the output projections of all layers are kept until the forward ends, then copied. Cosines are the
  diagonal of the similarity of every token of a batch with every other, once for block influence and once for the span.
  The projection's weight is copied and summed up for each batch and layer.
* `come_p`: the whole model is copied for each ratio, and run whole.
* `sleb`: the whole model is run for each layer that may go.

Windows without padding only. Whatever is not a measurement (site, ratio, which channels) is the method's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from come_pl import record as records
from come_pl.decoder import Decoder
from come_pl.pruning.methods.base import Method
from come_pl.pruning.methods.come import CoMe, keep
from come_pl.pruning.methods.come_p import CoMeP
from come_pl.pruning.methods.sleb import SLEB
from come_pl.pruning.sites import SiteRace
from come_pl.record import Record, Step
from come_pl.surgery import concatenate, dominant, replace_span, share
from come_pl.taps import boundaries, projection_inputs


def logits(model: Any, input_ids: Tensor) -> Tensor:
    """(batch, seq, vocabulary), of the whole model."""
    return model(input_ids=input_ids, use_cache=False).logits


def loss(model: Any, batches: Sequence[Tensor]) -> float:
    """Nats a token of windows (batch, seq); logits of a whole batch at once, in fp32."""
    nats, count = 0.0, 0
    for input_ids in batches:
        predicted = logits(model, input_ids)[:, :-1].float()
        targets = input_ids[:, 1:].flatten()
        nats += float(F.cross_entropy(predicted.reshape(len(targets), -1), targets, reduction="sum"))
        count += len(targets)
    return nats / count


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """(tokens,): the diagonal of all tokens' similarities with all tokens, of streams (batch, seq, hidden)."""
    units = [F.normalize(stream.flatten(0, 1).float(), dim=-1) for stream in (first, second)]
    return (units[0] @ units[1].T).diagonal().clamp(-1, 1)


def statistics(decoder: Decoder, batches: Sequence[Tensor], span: int = 2) -> dict[str, Tensor]:
    """What `taps.LayerStatistics` gives for the same windows (batch, seq): intensities, block influence and distances
    of spans of `span` layers."""
    depth, family = len(decoder), decoder.family
    projections = {"attention": family.attention_output, "mlp": family.mlp_output}
    totals: dict[str, Any] = {"attention": [0.0] * depth, "mlp": [0.0] * depth, "block_influence": [0.0] * depth}
    totals |= {"span_all": [0.0] * (depth - span + 1), "span_last": [0.0] * (depth - span + 1)}
    tokens = windows = 0
    for input_ids in batches:
        inputs: dict[tuple[str, int], Tensor] = {}

        def seen(kind: str, layer: int, x: Tensor, inputs: dict[tuple[str, int], Tensor] = inputs) -> None:
            inputs[kind, layer] = x

        with boundaries(decoder) as streams, projection_inputs(decoder, 0, seen):
            kept_logits = logits(decoder.model, input_ids)
        tokens, windows = tokens + input_ids.numel(), windows + len(input_ids)
        last = torch.arange(1, len(input_ids) + 1) * input_ids.shape[1] - 1  # of each window
        for layer in range(depth):
            for kind, path in projections.items():
                x = copy.deepcopy(inputs[kind, layer]).flatten(0, -2)
                weight = copy.deepcopy(decoder.part(decoder.layers[layer], path).weight)
                # mean|x| · Σ|W|, with the weights of a sum over batches; divided again by Σ|W| at the end
                totals[kind][layer] += (x.float().abs().sum(0) * weight.float().abs().sum(0)).double()
            influence = 1 - cosines(streams[layer], streams[layer + 1]).clamp(0, 1)
            totals["block_influence"][layer] += float(influence.sum(dtype=torch.float64))
            if layer + span <= depth:
                distance = cosines(streams[layer], streams[layer + span]).arccos() / math.pi
                totals["span_all"][layer] += float(distance.sum(dtype=torch.float64))
                totals["span_last"][layer] += float(distance[last].sum(dtype=torch.float64))
        del kept_logits  # a forward's output lives as long as its activations do
    found = {}
    for kind, path in projections.items():
        sums = [decoder.part(layer, path).weight.float().abs().sum(0).double() for layer in decoder.layers]
        found[kind] = torch.stack([t / s.clamp(min=1e-30) for t, s in zip(totals[kind], sums, strict=True)]) / tokens
    for name, count in (("block_influence", tokens), ("span_all", tokens), ("span_last", windows)):
        found[name] = torch.tensor(totals[name], dtype=torch.float64) / count
    return found


def come_step(method: CoMe, decoder: Decoder, batches: Sequence[Tensor], record: Record, remove: int) -> Step:
    """CoMe's formulas on naive statistics. Sites by span distance only."""
    view: Any = SimpleNamespace(student=decoder, sites=SiteRace())
    return CoMe.__call__(method, view, statistics(decoder, batches, method.span), record, remove=remove).step


def come_p_step(method: CoMeP, decoder: Decoder, batches: Sequence[Tensor], record: Record, remove: int) -> Step:
    """Each ratio of the grid in a copy of the whole model."""
    view: Any = SimpleNamespace(student=decoder, sites=SiteRace())
    found = statistics(decoder, batches, method.span)
    step = CoMe.__call__(method, view, found, record, remove=remove).step
    lowest, losses = math.inf, []
    for tick in range(method.granularity + 1):
        ratio = [tick / method.granularity, 1 - tick / method.granularity]
        candidate = Decoder(copy.deepcopy(decoder.model))
        pair = [candidate.layers[i] for i in step.layers]
        kept = keep(candidate, step.layers, ratio, found)
        layer = concatenate(candidate, pair, kept, ratio, method.norm)
        replace_span(candidate, step.layers[0], 2, layer, step.layers[dominant(ratio)])
        losses.append(loss(candidate.model, batches))
        if losses[-1] < lowest:
            lowest, step.ratio, step.kept = losses[-1], ratio, kept
    step.scores["ratio_loss"] = list(losses)
    return step


def sleb_step(method: SLEB, decoder: Decoder, batches: Sequence[Tensor], record: Record, remove: int) -> Step:
    """Each layer that may go is passed over in a run of the whole model."""
    losses = [math.inf] * record.layers
    for layer in range(method.barriers, record.layers - method.barriers):
        with decoder.arranged(skip=[layer]):
            losses[layer] = loss(decoder.model, batches)
    return Step("drop", [losses.index(min(losses))], scores={"loss_without": list(losses)})


STEPS: dict[type[Method], Callable[..., Step]] = {CoMe: come_step, CoMeP: come_p_step, SLEB: sleb_step}


@torch.inference_mode()
def prune(method: Method, model: Any, batches: Sequence[Tensor], target_layers: int) -> Record:
    """The record of pruning a copy of `model` to a depth, on windows (batch, seq) without padding.

    Raises:
        KeyError: a method without a naive counterpart.
    """
    take = STEPS[type(method)]
    decoder = Decoder(share(model))
    record = Record(len(decoder))
    while record.layers > target_layers:
        step = take(method, decoder, batches, record, remove=record.layers - target_layers)
        records.apply(step, decoder)
        record.append(step)
    return record
