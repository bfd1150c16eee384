"""What is read off a model while text runs through it.

Forward hooks, always removed again, and accumulators (torchmetrics, so that they reduce over ranks). Accumulators sum
each window in fp32 and the windows in fp64, so that the result does not depend on how windows are spread over batches
or processes. Padding never enters: every sum is weighted by a mask (batch, seq).

Indexing: boundary b is the stream before layer b; boundary L is the stream after the last layer, before the final norm.
(`hidden_states[-1]` of transformers is after the final norm and is not used.)
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

from come_pl.decoder import Decoder

# A head that is given few tokens spends its time on reading its weights, in half precision more so; in fp32 models that
# hardly fit into memory are pruned. Sums over a vocabulary are fastest in a processor's own cache.
LOGIT_CHUNK_BYTES = 24 * 2**20  # of fp32 logits of each model held at once
HALF_CHUNK_BYTES = 48 * 2**20  # … in half precision
ROWS = 128  # matrix products of a multiple of so many tokens are up to 1.5 times as fast as of others
PRECISE_BYTES = 16 * 2**20  # of them in fp32, while something is summed over them
CACHED_BYTES = 4 * 2**20  # the same on a processor


def _stream_of(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def stream_from(output: Tensor | tuple) -> Tensor:
    """The stream that a decoder layer returned: some releases of transformers wrap it in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@contextlib.contextmanager
def boundaries(decoder: Decoder, start: int = 0, into: Any = None, stop: int | None = None) -> Iterator[Any]:
    """Collects the stream (batch, seq, hidden) at every boundary from `start` to `stop` (by default the last), in the
    forward run inside: in a dictionary, or in `into`, whose items are set."""
    found: Any = {} if into is None else into
    handles = []
    layers = decoder.layers
    stop = len(layers) if stop is None else stop
    for index in range(start, stop):

        def before(module: nn.Module, args: tuple, kwargs: dict, index: int = index) -> None:
            found[index] = _stream_of(args, kwargs)

        handles.append(layers[index].register_forward_pre_hook(before, with_kwargs=True))

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        found[stop] = stream_from(output)

    handles.append(layers[stop - 1].register_forward_hook(after))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def streams(decoder: Decoder, wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the stream (batch, seq, hidden) at the wanted boundaries only, in the forward run inside.

    Boundary b is taken where layer b − 1 gives it, so a forward that stops there has it too.
    """
    found: dict[int, Tensor] = {}
    handles = []
    for boundary in wanted:
        if boundary == 0:

            def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
                found[0] = _stream_of(args, kwargs)

            handles.append(decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module: nn.Module, args: tuple, output: Any, boundary: int = boundary) -> None:
                found[boundary] = stream_from(output)

            handles.append(decoder.layers[boundary - 1].register_forward_hook(after))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def stream_at(
    decoder: Decoder,
    boundary: int,
    input_ids: Tensor,
    mask: Tensor | None = None,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
) -> Tensor:
    """The stream (batch, seq, hidden) at one boundary; no layer above it runs, and none below `start`, where the stream
    is `hidden`."""
    if boundary == start and hidden is not None:
        return hidden
    with streams(decoder, [boundary]) as found:
        decoder.run(input_ids, mask, start=start, hidden=hidden, stop=max(boundary, 1))
    return found[boundary]


def layer_run(
    decoder: Decoder,
    index: int,
    path: str,
    input_ids: Tensor,
    mask: Tensor | None,
    hidden: Tensor,
    layer: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """(output (batch, seq, hidden) of layer `index` on the stream `hidden`, input (batch, seq, channels) of its
    projection `path`); `layer` runs in its place."""
    found: dict[str, Tensor] = {}
    module = layer or decoder.layers[index]

    def before(module: nn.Module, args: tuple) -> None:
        found["x"] = args[0]

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        found["out"] = stream_from(output)

    handles = [decoder.part(module, path).register_forward_pre_hook(before), module.register_forward_hook(after)]
    # layer 0 is given its stream by the embeddings, which are the same for every student
    try:
        decoder.run(input_ids, mask, start=index, hidden=hidden, stop=index + 1, swap={index: module})
    finally:
        for handle in handles:
            handle.remove()
    return found["out"], found["x"].reshape(*input_ids.shape, -1)


class _Found(Exception):
    """Carries out of a forward what it was run for."""


def projection_input(
    decoder: Decoder, index: int, path: str, input_ids: Tensor, mask: Tensor | None, hidden: Tensor
) -> Tensor:
    """The input (batch, seq, channels) of projection `path` of layer `index` on the stream `hidden`; what comes
    after it does not run."""

    def before(module: nn.Module, args: tuple) -> None:
        raise _Found(args[0])

    handle = decoder.part(decoder.layers[index], path).register_forward_pre_hook(before)
    try:
        decoder.run(input_ids, mask, start=index, hidden=hidden, stop=index + 1)
    except _Found as found:
        return found.args[0].reshape(*input_ids.shape, -1)
    finally:
        handle.remove()
    raise AssertionError(f"the forward of layer {index} does not use {path}")


@contextlib.contextmanager
def projection_inputs(decoder: Decoder, start: int, seen: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Calls `seen("attention" | "mlp", layer, x)` with the input x (batch, seq, channels; OPT: batch·seq, channels) of
    the output projections of every layer from `start` on, while the forward runs."""
    handles = []
    for index in range(start, len(decoder)):
        layer = decoder.layers[index]
        for kind, path in (("attention", decoder.family.attention_output), ("mlp", decoder.family.mlp_output)):

            def before(module: nn.Module, args: tuple, kind: str = kind, index: int = index) -> None:
                seen(kind, index, args[0])

            handles.append(decoder.part(layer, path).register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LayerStatistics(Metric):
    """CoMe's statistics of every layer, from one pass over the calibration windows.

    After `compute()` (which sums over ranks):

    * `intensity["attention" | "mlp"]` (layers, channels): mean over tokens of |x_c|, x the input of the output
      projection.
    * `block_influence` (layers,): mean over tokens of 1 − clamp(cos(h_l, h_{l+1}), 0, 1) (ShortGPT; CoMe).
    * `span_last`, `span_all` (layers − span + 1,): mean of arccos(cos(h_l, h_{l+span})) / π over the last token of each
      window, over all tokens. `span_last_N`, `span_all_N`: those of N layers, for N from 2 to span − 1.

    Args:
        layers: depth of the student.
        span: number of layers a span covers (CoMe's `merge_item`). Shorter spans are measured too: the last step of a
            run may have to remove fewer layers than the others.
        channels: width of the inputs of attention and MLP output projections; None: no intensity is collected.
    """

    full_state_update = False

    sum_attention: Tensor
    sum_mlp: Tensor
    sum_influence: Tensor
    sum_span_last: Tensor
    sum_span_all: Tensor
    windows: Tensor
    tokens: Tensor

    def __init__(self, layers: int, span: int = 2, channels: tuple[int, int] | None = None):
        super().__init__(sync_on_compute=True)
        self.depth, self.span, self.channels = layers, span, channels
        self.sizes = range(min(span, 2), span + 1)
        self._buffers_of: dict[str, Tensor] = {}
        attention, mlp = channels or (0, 0)
        shapes = {
            "sum_attention": (layers, attention),
            "sum_mlp": (layers, mlp),
            "sum_influence": (layers,),
            "sum_span_last": (layers + 1, len(self.sizes)),  # by the boundary where the span ends
            "sum_span_all": (layers + 1, len(self.sizes)),
            "windows": (layers + 1,),  # that were counted at each boundary
            "tokens": (layers + 1,),
        }
        self.set_dtype(torch.float64)
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def carry(self, depth: int, start: int) -> LayerStatistics:
        """Statistics for a student of `depth` layers, of which those below `start` are unchanged: their sums are
        kept, all others are zero."""
        fresh = LayerStatistics(depth, self.span, self.channels).to(self.tokens.device)
        for name in ("sum_attention", "sum_mlp", "sum_influence"):
            getattr(fresh, name)[:start] = getattr(self, name)[:start]
        for name in ("sum_span_last", "sum_span_all", "windows", "tokens"):
            getattr(fresh, name)[: start + 1] = getattr(self, name)[: start + 1]
        return fresh

    def add_channels(self, kind: str, layer: int, x: Tensor, mask: Tensor) -> None:
        """x: (batch, seq, channels) or (batch·seq, channels); mask: (batch, seq)."""
        x = self._magnitudes(kind, x.detach().reshape(*mask.shape, -1))
        per_window = torch.einsum("bs,bsc->bc", mask.float(), x)
        getattr(self, f"sum_{kind}")[layer] += per_window.to(self.tokens.dtype).sum(0)

    def _magnitudes(self, kind: str, x: Tensor) -> Tensor:
        """|x| in fp32, in a buffer that all layers use: pages that are new each time cost more than the arithmetic."""
        buffer = self._buffers_of.get(kind)
        usable = buffer is not None and (buffer.shape, buffer.device) == (x.shape, x.device)
        if buffer is None or not usable or buffer.is_inference() != torch.is_inference_mode_enabled():
            buffer = self._buffers_of[kind] = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        return torch.abs(x, out=buffer) if x.dtype == torch.float32 else buffer.copy_(x).abs_()

    def update(
        self,
        states: Any,
        mask: Tensor,
        start: int = 0,
        stop: int | None = None,
        seen: Callable[[int, int, Tensor], None] | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            states: boundary → (batch, seq, hidden), at least all from `start` on and those that a span ending above
                `start` begins at; each is asked for once.
            mask: (batch, seq), True where a token counts.
            start: lowest layer that ran; statistics below it are left alone.
            stop: lowest layer above those that ran; by default all ran.
            seen: called with (boundary where a span ends, its layers, distance (batch, seq)).
        """
        stop = self.depth if stop is None else stop
        precise = self.tokens.dtype
        weight = mask.to(precise)
        last = last_token(mask)
        has_tokens = mask.any(1).to(precise)
        self.tokens[start + 1 : stop + 1] += weight.sum()
        self.windows[start + 1 : stop + 1] += has_tokens.sum()
        units: dict[int, Tensor] = {}

        def chord(first: int, second: int) -> Tensor:
            """|u − v| of the unit vectors: 1 − cos = |u − v|² / 2 and arccos(cos) = 2 arcsin(|u − v| / 2), which keep
            their digits where cos is near 1, as it is between adjacent layers."""
            for boundary in (first, second):
                if boundary not in units:
                    units[boundary] = F.normalize(states[boundary].to(weight.device).float(), dim=-1)
            return torch.linalg.vector_norm(units[first] - units[second], dim=-1).to(precise)

        for boundary in range(start + 1, stop + 1):
            units.pop(boundary - self.span - 1, None)
            influence = (chord(boundary - 1, boundary) ** 2 / 2).clamp(0, 1)
            self.sum_influence[boundary - 1] += (influence * weight).sum()
            for column, size in enumerate(self.sizes):
                if boundary >= size:
                    distance = 2 * (chord(boundary - size, boundary) / 2).clamp(max=1).arcsin() / math.pi
                    if seen is not None:
                        seen(boundary, size, distance)
                    self.sum_span_all[boundary, column] += (distance * weight).sum()
                    at_last = distance.gather(1, last[:, None]).squeeze(1)
                    self.sum_span_last[boundary, column] += (at_last * has_tokens).sum()

    def compute(self) -> dict[str, Tensor]:
        self._buffers_of.clear()  # the pass is over
        tokens, windows = self.tokens.clamp(min=1), self.windows.clamp(min=1)
        result = {
            "block_influence": self.sum_influence / tokens[1:],
            "tokens": self.tokens[1:],
        }
        for column, size in enumerate(self.sizes):
            suffix = "" if size == self.span else f"_{size}"
            result["span_all" + suffix] = self.sum_span_all[size:, column] / tokens[size:]
            result["span_last" + suffix] = self.sum_span_last[size:, column] / windows[size:]
        if self.channels:
            ran = tokens[1:, None]
            result |= {"attention": self.sum_attention / ran, "mlp": self.sum_mlp / ran}
        return {name: value.detach().clone() for name, value in result.items()}


def last_token(mask: Tensor) -> Tensor:
    """Index of the last counted token of each row (batch,); 0 for a row without any."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(1)


def logit_rows(decoder: Decoder) -> int:
    """How many tokens' logits are held at once, of each model."""
    weight = decoder.model.get_output_embeddings().weight
    limit = LOGIT_CHUNK_BYTES if weight.dtype.itemsize > 2 else HALF_CHUNK_BYTES
    rows = limit // (weight.dtype.itemsize * weight.shape[0])
    return max(1, rows // ROWS * ROWS or rows)


def _chunks(decoder: Decoder, batch: int, seq: int) -> Iterator[slice]:
    size = max(1, logit_rows(decoder) // batch)
    for begin in range(0, seq, size):
        yield slice(begin, min(begin + size, seq))


def _in_slices(function: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """A function of rows of logits (rows, vocab) in fp32, and of what belongs to the rows, a slice at a time.

    Args:
        tensors: (batch, seq, vocab) or (batch, seq).
    """
    held = CACHED_BYTES if tensors[0].device.type == "cpu" else PRECISE_BYTES
    size = max(1, held // (4 * tensors[0].shape[-1]))
    parts = [tensor.flatten(0, 1).split(size) for tensor in tensors]
    return [function(*(p.float() if p.dim() == 2 else p for p in each)) for each in zip(*parts, strict=True)]


def targets_of(mask: Tensor) -> Tensor:
    """(batch, seq − 1): True where position t+1 is a real token predicted from a real token t."""
    return mask[:, 1:] & mask[:, :-1]


def token_losses(decoder: Decoder, hidden: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of each next token, (batch, seq − 1), 0 where nothing is predicted.

    Logits exist for a slice of the sequence at a time, also in a backward pass.
    """

    def sliced(stream: Tensor, targets: Tensor) -> Tensor:
        losses = _in_slices(functools.partial(F.cross_entropy, reduction="none"), decoder.logits(stream), targets)
        return torch.cat(losses).view(targets.shape)

    counted = targets_of(mask)
    batch, seq = counted.shape
    losses = []
    for part in _chunks(decoder, batch, seq):
        inputs = hidden[:, :-1][:, part], input_ids[:, 1:][:, part]
        losses.append(checkpoint(sliced, *inputs, use_reentrant=False) if hidden.requires_grad else sliced(*inputs))
    # not a product: what a padding position predicts may be NaN
    return torch.cat(losses, 1).where(counted, 0.0)


def losses_and_divergences(
    student: Decoder, hidden: Tensor, teacher: Decoder, teacher_hidden: Tensor, input_ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(`token_losses` of the student (batch, seq − 1), KL(teacher ‖ student) of the next-token distributions in nats
    (batch, seq), 0 at padding), from final hidden states; the student's logits are computed once for both."""

    def sliced(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        losses = -log_student.gather(-1, targets[:, None]).squeeze(-1)
        return torch.stack([losses, (log_teacher.exp() * log_student.neg_().add_(log_teacher)).sum(-1)])

    batch, seq = hidden.shape[:2]
    following = F.pad(input_ids[:, 1:], (0, 1))
    found = []
    for part in _chunks(student, batch, seq):
        logits = student.logits(hidden[:, part]), teacher.logits(teacher_hidden[:, part])
        both = torch.cat(_in_slices(sliced, *logits, following[:, part]), 1)
        found.append(both.view(2, batch, -1))
    losses, divergences = torch.cat(found, 2)
    return losses[:, :-1].where(targets_of(mask), 0.0), divergences.where(mask, 0.0)
