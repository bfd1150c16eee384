"""The only code that edits a model.

`share` makes the student, `drop` and `replace_span` change its layer list, `concatenate` builds CoMe's new layer,
`blend` a weighted sum of layers, `set_weights` and `scale_stream` change parameters (never the teacher's), and
`reindex` keeps the config and every `layer_idx` true to the layers that are there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from come_pl.decoder import Decoder
from come_pl.offload import adopt, copied, present

Norm = Literal["mean", "dominant", "fold"]
BlendNorm = Literal["first", "mix"]
FINAL_NORM = "final_norm"  # the owner of weights that no layer owns


@dataclass(frozen=True)
class Kept:
    """What a concatenated layer keeps of one of its sources: indices in ascending order."""

    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]


def share(model: Any) -> Any:
    """A copy of `model` with its own modules and config, whose parameters and buffers are the very same tensors.

    Editing the copy's layer list leaves `model` whole, and every untouched layer is held once.
    """
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def reindex(decoder: Decoder, sources: Sequence[int]) -> None:
    """Make config and `layer_idx` agree with the layer list.

    Args:
        decoder: the edited model.
        sources: for each layer now in the list, the index in the old list whose per-layer config entries
            (`layer_types`, …) it takes.
    """
    config, old = decoder.config, decoder.config.num_hidden_layers
    for name, value in list(vars(config).items()):
        # transformers keeps per-layer lists under many names (layer_types, mlp_layer_types, no_rope_layers …)
        if "layer" in name and isinstance(value, list | tuple) and len(value) == old:
            setattr(config, name, [value[i] for i in sources])
    # layers below `max_window_layers` use full attention; with an explicit layer_types only its bound must hold
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(1 for i in sources if i < config.max_window_layers)
    config.num_hidden_layers = len(sources)
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    types = getattr(config, "layer_types", None)
    if types and hasattr(decoder.base, "has_sliding_layers"):
        decoder.base.has_sliding_layers = "sliding_attention" in types
    if hasattr(config, "validate"):
        config.validate()


def drop(decoder: Decoder, index: int) -> None:
    """Remove one layer."""
    sources = [i for i in range(len(decoder)) if i != index]
    decoder.base.layers = nn.ModuleList(decoder.layers[i] for i in sources)
    reindex(decoder, sources)


def replace_span(decoder: Decoder, first: int, count: int, layer: nn.Module, source: int) -> None:
    """Put `layer` in the place of layers `first` … `first + count - 1`; it takes the config entries of `source`."""
    sources = [*range(first), source, *range(first + count, len(decoder))]
    layers = list(decoder.layers)
    adopt(layer, like=layers[first])
    layers[first : first + count] = [layer]
    decoder.base.layers = nn.ModuleList(layers)
    reindex(decoder, sources)


def dominant(ratio: Sequence[float]) -> int:
    """Position of the largest share; the first of equals."""
    return max(range(len(ratio)), key=lambda i: (ratio[i], -i))


def head_channels(kv_heads: Sequence[int], heads_per_kv: int, head_dim: int, device: Any = None) -> Tensor:
    """Channel indices of the query heads (`heads_per_kv` > 1) or KV heads (1) that belong to `kv_heads`.

    Query head h belongs to KV head h // heads_per_kv (`repeat_kv` in transformers).
    """
    width = heads_per_kv * head_dim
    groups = torch.tensor(list(kv_heads), dtype=torch.long, device=device)
    return (groups[:, None] * width + torch.arange(width, device=device)).flatten()


@torch.no_grad()
def concatenate(
    decoder: Decoder,
    layers: Sequence[nn.Module],
    kept: Sequence[Kept],
    ratio: Sequence[float],
    norm: Norm = "mean",
) -> nn.Module:
    """CoMe's new layer: the kept channels of `layers`, concatenated in order into one layer of the same shape.

    A KV head is kept with its own query heads, its rows of the key and value projections and its columns of the output
    projection; an FFN neuron with its rows of the input projections and its column of the output projection. Output
    biases and norms on heads or outputs are mixed by `ratio`.

    Args:
        decoder: the model that the layers belong to.
        layers: two or more decoder layers, shallow first.
        kept: what to keep of each; counts must add up to the model's KV heads and FFN width.
        ratio: share of each layer; sums to 1.
        norm: the norms that feed projections. `mean`: plain mean of the layers' weights, as the released code has it.
            `dominant`: those of the layer with the largest share. `fold`: the dominant layer's, with the difference
            multiplied into each kept channel's own weights, so that it sees exactly its own layer's norm.

    Raises:
        ValueError: counts that do not add up; `fold` with a norm bias that no projection bias can take.
    """
    family, shape = decoder.family, decoder.geometry
    totals = [
        ("KV heads", sum(len(k.kv_heads) for k in kept), shape.kv_heads),
        ("FFN neurons", sum(len(k.neurons) for k in kept), shape.ffn),
    ]
    for what, got, expected in totals:
        if got != expected:
            raise ValueError(f"a concatenated layer needs {expected} {what}, the kept ones are {got}")
    main = dominant(ratio)
    if norm == "fold" and not any(k.kv_heads or k.neurons for i, k in enumerate(kept) if i != main):
        norm = "dominant"  # nothing of the other layers is kept: their norms have no channel to be folded into
    # the student's config must stay the one object that all of its layers refer to
    new = copied(layers[main], decoder.config)
    device = next(new.parameters()).device

    def rows(indices: Sequence[Tensor], path: str, norm_path: str | None) -> None:
        target = decoder.part(new, path)
        folds: list[tuple[Tensor, Tensor | None] | None] = [None] * len(layers)
        if norm == "fold" and norm_path:
            folds = _folds(decoder, layers, norm_path, main)
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for layer, index, fold in zip(layers, indices, folds, strict=True):
            linear = decoder.part(layer, path)
            with present(linear):
                weight = linear.weight[index]
            bias = None if linear.bias is None else linear.bias[index]
            if fold is not None:
                scale, shift = fold
                if shift is not None:
                    if bias is None:
                        raise ValueError(f"norm 'fold' needs a bias in {path} to take the norm's bias; use 'dominant'")
                    bias = (bias.float() + weight.float() @ shift).to(weight.dtype)
                weight = (weight.float() * scale).to(weight.dtype)
            weights.append(weight)
            if bias is not None:
                biases.append(bias)
        target.weight.copy_(torch.cat(weights))
        if target.bias is not None:
            target.bias.copy_(torch.cat(biases))

    def columns(indices: Sequence[Tensor], path: str) -> None:
        target = decoder.part(new, path)
        sources = [decoder.part(layer, path) for layer in layers]
        weights = []
        for source, index in zip(sources, indices, strict=True):
            with present(source):
                weights.append(source.weight[:, index])
        target.weight.copy_(torch.cat(weights, dim=1))
        if target.bias is not None:
            target.bias.copy_(_mix([s.bias for s in sources], ratio))

    query = [head_channels(k.kv_heads, shape.heads_per_kv, shape.head_dim, device) for k in kept]
    key = [head_channels(k.kv_heads, 1, shape.head_dim, device) for k in kept]
    neurons = [torch.tensor(k.neurons, dtype=torch.long, device=device) for k in kept]
    rows(query, family.query, family.attention_norm)
    rows(key, family.key, family.attention_norm)
    rows(key, family.value, family.attention_norm)
    columns(query, family.attention_output)
    for path in family.mlp_inputs:
        rows(neurons, path, family.mlp_norm)
    columns(neurons, family.mlp_output)
    for norm_path in (family.attention_norm, family.mlp_norm):
        if norm_path:
            _set_norm(decoder, new, layers, norm_path, norm, main)
    for norm_path in family.mixed_norms:
        for name, parameter in decoder.part(new, norm_path).named_parameters():
            parameter.copy_(_mix([getattr(decoder.part(layer, norm_path), name) for layer in layers], ratio))
    return new


@torch.no_grad()
def blend(
    decoder: Decoder, layers: Sequence[nn.Module], coefficients: Sequence[float], norm: BlendNorm = "first"
) -> nn.Module:
    """One layer whose projections are Σ cᵢ Wᵢ, summed in fp32; it takes the config entries of the first layer.

    Args:
        decoder: the model that the layers belong to.
        layers: two or more decoder layers, shallow first.
        coefficients: cᵢ; they need not sum to 1 (LaCo's published formula: 1 − m, 1, …, 1).
        norm: norms of the new layer: the `first` layer's, or the same sum as the projections (`mix`).
    """
    if len(coefficients) != len(layers):
        raise ValueError(f"{len(layers)} layers cannot be blended with {len(coefficients)} coefficients")
    family = decoder.family
    norms = tuple(p for p in (family.attention_norm, family.mlp_norm, *family.mixed_norms) if p)
    new = copied(layers[0], decoder.config)
    others = [dict(layer.named_parameters()) for layer in layers]
    for name, parameter in new.named_parameters():
        if norm == "first" and name.startswith(tuple(f"{n}." for n in norms)):
            continue
        sources = [own[name] for own in others]
        with present(*sources):
            parameter.copy_(_mix(sources, coefficients))
    return new


@torch.no_grad()
def set_weights(decoder: Decoder, weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Give layers parameters of their own: the tensors that they share with another model stay as they are.

    Args:
        weights: by "index.path", the path relative to the layer (`3.mlp.down_proj.weight`), or "final_norm.name".

    Returns:
        The new parameters by these names; of an offloaded model they are in files.

    Raises:
        ValueError: a layer or parameter that is not there, or another shape.
    """
    found = {}
    for name, tensor in weights.items():
        index, _, path = name.partition(".")
        owner, _, attribute = path.rpartition(".")
        try:
            layer = decoder.final_norm if index == FINAL_NORM else decoder.layers[int(index)]
            module = layer.get_submodule(owner)
            old = module.get_parameter(attribute)
        except (AttributeError, IndexError, ValueError):
            raise ValueError(f"weights for {name!r}, which this model of {len(decoder)} layers has not") from None
        if old.shape != tensor.shape:
            raise ValueError(f"weights for {name!r} are {tuple(tensor.shape)}, the model's {tuple(old.shape)}")
        new = nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=old.requires_grad)
        adopt(new, like=old)
        setattr(module, attribute, new)
        found[name] = new
    return found


def put_back(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give a layer the very parameters that it had before `set_weights`, by their paths."""
    for name, parameter in parameters.items():
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, parameter)


def check_scalable(decoder: Decoder) -> None:
    """Raises ValueError: `scale_stream` cannot scale this model's stream."""
    if decoder.family.attention_norm is None:
        why = "normalises its stream after each sublayer (OPT-350m)"
    elif _tied(decoder) and not list(decoder.final_norm.parameters() if decoder.final_norm is not None else ()):
        why = "has its embeddings as its head and no weight in the norm before it (Galactica)"
    else:
        return
    raise ValueError(f"the stream of a model that {why} cannot be scaled; give --compensate none")


def _tied(decoder: Decoder) -> bool:
    head = decoder.model.get_output_embeddings()
    return head is not None and head.weight is decoder.base.embed_tokens.weight


@torch.no_grad()
def scale_stream(decoder: Decoder, below: int, factor: float) -> None:
    """Multiply the residual stream before layer `below` by `factor`, in the weights that write to it.

    Embeddings and everything that the layers under `below` add to the stream are multiplied; pre-norm layers do not see
    the difference, up to their epsilon (Prune&Comp, AAAI 2026). With tied embeddings the final norm takes 1/factor.

    Raises:
        ValueError: as `check_scalable`.
    """
    check_scalable(decoder)
    family, base, tied = decoder.family, decoder.base, _tied(decoder)
    for module in (base.embed_tokens, getattr(base, "embed_positions", None)):
        if module is not None:
            module.weight = nn.Parameter(module.weight * factor, requires_grad=module.weight.requires_grad)
    if tied:
        decoder.model.get_output_embeddings().weight = base.embed_tokens.weight
        final = decoder.final_norm
        for name, parameter in list(final.named_parameters()):
            offset = family.norm_offset if name == "weight" else 0.0
            scaled = (parameter.float() + offset) / factor - offset
            setattr(final, name, nn.Parameter(scaled.to(parameter.dtype), requires_grad=parameter.requires_grad))
    for index in range(below):
        for path in family.writers:
            for name, parameter in decoder.part(decoder.layers[index], path).named_parameters():
                offset = family.norm_offset if path in family.mixed_norms else 0.0
                with present(parameter):
                    scaled = (parameter.float() + offset) * factor - offset
                set_weights(decoder, {f"{index}.{path}.{name}": scaled})


def _mix(tensors: Sequence[Tensor], ratio: Sequence[float]) -> Tensor:
    return sum(r * t.float() for r, t in zip(ratio, tensors, strict=True) if r != 0).to(tensors[0].dtype)  # type: ignore[union-attr,return-value]


def _gains(decoder: Decoder, layers: Sequence[nn.Module], path: str) -> list[Tensor]:
    """What each layer's norm multiplies the normalised stream by, fp32 (hidden,)."""
    norms = [decoder.part(layer, path) for layer in layers]
    if norms[0].weight is None:  # a norm without affine parameters
        return [torch.ones(decoder.geometry.hidden) for _ in norms]
    return [norm.weight.float() + decoder.family.norm_offset for norm in norms]


def _common_gain(gains: Sequence[Tensor], main: int) -> Tensor:
    """The gain of the new norm: the dominant layer's, but where that is so small that dividing by it would lose
    precision, the largest of all layers' (the dominant layer's own channels are then scaled too)."""
    stacked = torch.stack(list(gains))
    largest = stacked.gather(0, stacked.abs().argmax(0, keepdim=True)).squeeze(0)
    return torch.where(gains[main].abs() < 1e-3 * largest.abs(), largest, gains[main])


def _folds(
    decoder: Decoder, layers: Sequence[nn.Module], path: str, main: int
) -> list[tuple[Tensor, Tensor | None] | None]:
    """For each layer (scale, shift): W·(γᵢ n + βᵢ) = (W·scale)·(γ n + β) + W·shift, γ and β those of the new norm.

    None where nothing has to change, so that the dominant layer's weights stay as they are, bit for bit.
    """
    gains = _gains(decoder, layers, path)
    common = _common_gain(gains, main)
    biases: list[Any] = [getattr(decoder.part(layer, path), "bias", None) for layer in layers]
    folds: list[tuple[Tensor, Tensor | None] | None] = []
    for gain, bias in zip(gains, biases, strict=True):
        scale = torch.where(common == 0, torch.ones_like(gain), gain / torch.where(common == 0, 1.0, common))
        shift = None if bias is None else bias.float() - scale * biases[main].float()
        unchanged = bool((scale == 1).all()) and (shift is None or bool((shift == 0).all()))
        folds.append(None if unchanged else (scale, shift))
    return folds


def _set_norm(decoder: Decoder, new: nn.Module, layers: Sequence[nn.Module], path: str, norm: Norm, main: int) -> None:
    target = decoder.part(new, path)
    if norm == "mean":
        for name, parameter in target.named_parameters():
            values = [getattr(decoder.part(layer, path), name).float() for layer in layers]
            parameter.copy_(torch.stack(values).mean(0))
    elif norm == "fold" and target.weight is not None:
        # only where the dominant gain is too small to divide by: elsewhere the copy already has the right bits
        gains = _gains(decoder, layers, path)
        common = _common_gain(gains, main)
        target.weight.copy_(
            torch.where(common == gains[main], target.weight.float(), common - decoder.family.norm_offset)
        )
