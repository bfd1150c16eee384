"""Where things are in a decoder family.

One small declarative entry a family (`FAMILIES`), and `Decoder`, the view of a causal LM that the rest of the package
works through: its layer list, its geometry, a forward that can start in the middle, and logits without the vocabulary
sitting in memory for the whole sequence.

A family that is not listed is refused. To add one, append a `Family`: every name in it is the path of a submodule of a
decoder layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from come_pl.compiled import compiled


class UnsupportedModel(ValueError):
    """The model's architecture is not one that this package knows, or lacks a part that it needs."""


@dataclass(frozen=True)
class Family:
    """Where one decoder family keeps its parts; paths are relative to a decoder layer."""

    name: str
    model_types: tuple[str, ...]
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"  # between them: act(first input), times the second where there is one
    attention_norm: str | None = "input_layernorm"  # feeds query, key and value; None: they read the stream itself
    mlp_norm: str | None = "post_attention_layernorm"  # feeds the MLP's inputs
    mixed_norms: tuple[str, ...] = ()  # norms that cannot be folded: on heads, on outputs
    norm_offset: float = 0.0  # Gemma's norms scale by (1 + weight)
    needs_bos: bool = False  # Gemma without BOS in each window is unusable (shortened-llm#6)
    learned_positions: bool = False  # a row for each: there is no position beyond the last
    output_norms: tuple[str, ...] = ()  # norms between a sublayer and the stream that it is added to

    @property
    def linear_outputs(self) -> bool:
        """Whether a layer's output is linear in its output projections: no norm stands between them and the stream."""
        return not self.output_norms and self.attention_norm is not None

    @property
    def writers(self) -> tuple[str, ...]:
        """The parts whose output is added to the stream."""
        return self.output_norms or (self.attention_output, self.mlp_output)


FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama",)),
    Family("mistral", ("mistral",)),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",), mixed_norms=("self_attn.q_norm", "self_attn.k_norm")),
    Family(
        "opt",
        ("opt",),
        attention_output="self_attn.out_proj",
        mlp_inputs=("fc1",),
        mlp_output="fc2",
        activation="activation_fn",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        needs_bos=True,
        learned_positions=True,
    ),
    Family("gemma", ("gemma",), norm_offset=1.0, needs_bos=True),
    Family(
        "gemma2",
        ("gemma2",),
        mlp_norm="pre_feedforward_layernorm",
        mixed_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        needs_bos=True,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    Family(
        "gemma3",
        ("gemma3_text",),
        mlp_norm="pre_feedforward_layernorm",
        mixed_norms=(
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
        ),
        norm_offset=1.0,
        needs_bos=True,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
)


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        UnsupportedModel: the `model_type` is not known; the message lists those that are.
    """
    config = config.get_text_config(decoder=True)
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            if family.name == "opt" and not config.do_layer_norm_before:
                # OPT-350m normalises after each sublayer: no norm feeds a projection, so none can be folded
                norms = tuple(n for n in (family.attention_norm, family.mlp_norm) if n)
                return replace(family, attention_norm=None, mlp_norm=None, mixed_norms=norms)
            return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    raise UnsupportedModel(
        f"model_type {model_type!r} is not supported; known: {known}. To add it, append a Family entry to "
        "come_pl/decoder.py that names its projections and norms."
    )


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder layer."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads


class _Skip(nn.Module):
    """Stands in a layer list for a layer that is not run; keeps the indices of the others right."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Resume(_Skip):
    """Replaces the stream by states computed earlier."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden.to(hidden_states.device, non_blocking=True)


class Decoder:
    """A causal LM seen as a stack of equal layers.

    Args:
        model: a `transformers` causal LM of one of `FAMILIES`.
        compiled: `run` its layers through torch.compile where that is possible (`come_pl/compiled.py`).
        products: what the layers' products are computed in where that is not the dtype of the weights: bfloat16. The
            stream, norms and logits keep their dtype.

    Raises:
        UnsupportedModel: unknown family, or a layer without one of the parts that the family names.
    """

    def __init__(self, model: Any, compiled: bool = False, products: torch.dtype | None = None):
        self.model, self.compiled, self.products = model, compiled, products
        self.config = model.config.get_text_config(decoder=True)
        self.family = family_of(model.config)
        base = model.get_decoder()
        # OPTForCausalLM.get_decoder gives OPTModel's inner decoder in some releases and OPTModel in others
        self.base = base if hasattr(base, "layers") else base.decoder
        self._check()
        self.geometry = self._geometry()

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.base.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def final_norm(self) -> Any:
        """The norm between the last layer and the head."""
        return getattr(self.base, "norm", None) or self.base.final_layer_norm

    def part(self, layer: nn.Module, path: str) -> Any:
        """A submodule of a layer by one of the family's paths."""
        return layer.get_submodule(path)

    def _check(self) -> None:
        family, layer = self.family, self.layers[0]
        paths = [family.query, family.key, family.value, family.attention_output, *family.mlp_inputs]
        paths += [family.mlp_output, family.activation, *family.mixed_norms]
        paths += [p for p in (family.attention_norm, family.mlp_norm) if p]
        for path in paths:
            try:
                layer.get_submodule(path)
            except AttributeError:
                raise UnsupportedModel(
                    f"a layer of this {family.name} model ({type(layer).__name__}) has no {path!r}, which the family's "
                    "entry in come_pl/decoder.py names; correct the entry or add a family for this model"
                ) from None

    def _geometry(self) -> Geometry:
        layer, family = self.layers[0], self.family
        q, k = self.part(layer, family.query).weight, self.part(layer, family.key).weight
        heads = self.config.num_attention_heads
        head_dim = q.shape[0] // heads
        return Geometry(
            hidden=q.shape[1],
            ffn=self.part(layer, family.mlp_output).weight.shape[1],
            heads=heads,
            kv_heads=k.shape[0] // head_dim,
            head_dim=head_dim,
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return sum(p.numel() for p in self.layers[0].parameters())

    @contextlib.contextmanager
    def arranged(
        self,
        *,
        start: int = 0,
        hidden: Tensor | None = None,
        swap: Mapping[int, nn.Module] | None = None,
        skip: Collection[int] = (),
        stop: int | None = None,
    ) -> Iterator[None]:
        """Within the context the model's forward runs only part of its layers.

        Layers below `start` are not run and the stream at `start` is `hidden`; layers in `skip` and from `stop` on are
        passed over; a layer in `swap` is replaced. Indices stay what they are, so that per-layer masks and rotary
        tables (sliding windows) are the right ones, and the code that runs is the model's own.
        """
        stop = len(self) if stop is None else stop
        original = self.layers
        arranged: list[nn.Module] = []
        for index, layer in enumerate(original):
            if index < start or index >= stop or index in skip:
                arranged.append(_Skip())
            else:
                arranged.append((swap or {}).get(index, layer))
        if start > 0:
            assert hidden is not None, "a forward that starts in the middle needs the hidden states there"
            arranged[start - 1] = _Resume(hidden)
        self.base.layers = nn.ModuleList(arranged)
        try:
            yield
        finally:
            self.base.layers = original

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **arrangement: Any) -> Tensor:
        """Final hidden states (batch, seq, hidden), after the final norm, of `input_ids` (batch, seq).

        `arrangement` is that of `arranged`. No logits, no KV cache.
        """
        with self.arranged(**arrangement), compiled(self._that_run() if self.compiled else ()), self.mixed():
            found = self.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return found if self.products is None else found.to(self.model.dtype)  # OPT-350m ends with a product

    def mixed(self) -> contextlib.AbstractContextManager:
        """Within it products are computed in `products`, and sums of them in fp32."""
        if self.products is None:  # one that a trainer has begun goes on
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.products)

    def _that_run(self) -> list[nn.Module]:
        return [layer for layer in self.layers if not isinstance(layer, _Skip)]

    def mlp_channels(self, x: Tensor, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """(…, channels): what an MLP that reads x (…, hidden) with these weights (channels, hidden) and biases gives
        its output projection."""
        with self.mixed():
            gate, *others = (F.linear(x, weight, bias) for weight, bias in inputs)
            found = self.part(self.layers[0], self.family.activation)(gate)
        for other in others:
            found = found * other
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocab) of final hidden states (…, hidden), soft-capped where the family does that (Gemma 2)."""
        # a slice of the sequence is strided, and a linear layer then takes a path that is up to 40 times slower (bf16,
        # CPU); so it is, though it counts as contiguous, for a batch of one window
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        logits = self.model.get_output_embeddings()(rows).view(*hidden.shape[:-1], -1)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def attention_mask(mask: Tensor) -> Tensor | None:
    """What the model gets: None for windows without padding, which keeps attention kernels on their fast path. A window
    of weight zero (no token counts) is run as if it were whole."""
    if bool(mask.all()):
        return None
    mask = mask | ~mask.any(1, keepdim=True)
    return None if bool(mask.all()) else mask.long()
