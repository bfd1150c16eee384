"""Tiny random models of every supported family, made here: no network, no download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # before torch is there: products are in fp32 by default on every machine

import pytest
import torch

VOCABULARY = 97


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Files that run the command line take minutes: they come first, so that no worker is left alone with one of them
    at the end."""
    items.sort(key=lambda item: not (item.path.stem.endswith("_cli") or item.path.stem == "test_real"))


def _config(family: str, **sizes: Any) -> Any:
    import transformers as t

    if family.startswith("opt"):
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
        for absent in ("num_key_value_heads", "head_dim"):
            sizes.pop(absent)
        opt = {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "dropout": 0.0}
        if family == "opt-350m":
            opt |= {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
        return t.OPTConfig(**opt, **sizes)
    common = {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    mixed = ["sliding_attention", "full_attention"] * 8
    types = mixed[: sizes["num_hidden_layers"]]
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, {}),
        "llama-biases": (t.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        "mistral": (t.MistralConfig, {"sliding_window": 5}),
        "qwen2": (t.Qwen2Config, {}),
        "qwen2-window": (t.Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        "qwen2-mixed": (
            t.Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": types},
        ),
        "qwen3": (t.Qwen3Config, {}),
        "gemma": (t.GemmaConfig, {"hidden_activation": "gelu_pytorch_tanh"}),
        "gemma2": (t.Gemma2Config, {"sliding_window": 4, "layer_types": types, "final_logit_softcapping": 1.5}),
        "gemma3": (t.Gemma3TextConfig, {"sliding_window": 4, "layer_types": types}),
    }
    if family not in classes:
        raise ValueError(f"no tiny {family!r}")
    maker, extra = classes[family]
    return maker(**(common | extra | sizes))


FAMILIES = (
    "llama",
    "llama-biases",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen2-mixed",
    "qwen3",
    "opt",
    "opt-350m",
    "gemma",
    "gemma2",
    "gemma3",
)
MIXED_NORMS = ("qwen3", "opt-350m", "gemma2", "gemma3")  # norms that folding cannot make exact
SOLVABLE = tuple(f for f in FAMILIES if f not in ("gemma2", "gemma3", "opt-350m"))  # for by a repair


def tiny_model(family: str = "llama", gqa: bool = True, layers: int = 4, seed: int = 0, **over: Any) -> Any:
    """A random causal LM of a family in fp32, 4 query heads over 2 KV heads (`gqa`) or 4. Norms and biases are random
    too, and the embeddings large enough that every layer changes the stream by a fair share.

    `over`: fields of the config.
    """
    from transformers import AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if gqa else 4,
        "head_dim": 8,
    }
    config = _config(family, **(sizes | over))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                gemma = family.startswith("gemma") and path.endswith("weight")
                centre = 0.0 if gemma or path.endswith("bias") else 1.0
                parameter.copy_(centre + 0.4 * torch.randn_like(parameter))
            elif path.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in path:
                # Gemma multiplies embeddings by the square root of the width
                parameter.copy_(torch.randn_like(parameter) / (32**0.5 if family.startswith("gemma") else 1))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 * 0.7)
    return model


def seeing_model(layers: int = 4, seed: int = 0) -> Any:
    """A random Gemma 3 that also sees: its vision tower has projections of the same names as its text model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
        **{"sliding_window": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
    }
    vision = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14},
    }
    torch.manual_seed(seed)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def tiny_ids(windows: int = 3, seq: int = 12, seed: int = 1) -> torch.Tensor:
    """(windows, seq) random tokens that are neither BOS nor padding."""
    return torch.randint(3, VOCABULARY, (windows, seq), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> Any:
    """One token a word: "w7" is token 10; any other word is unknown. BOS and EOS 0, padding 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<pad>": 1, "<unk>": 2, **{f"w{i}": 3 + i for i in range(VOCABULARY - 3)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_tiny(folder: Path, family: str = "llama", **options: Any) -> str:
    """Writes a tiny checkpoint with its tokenizer, for tests of the command line; returns its path."""
    tiny_model(family, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_text(path: Path, words: int = 2000, seed: int = 0) -> str:
    """Writes a text of the tiny tokenizer's words, ten to a paragraph; returns its path."""
    numbers = torch.randint(0, VOCABULARY - 3, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    paragraphs = [" ".join(f"w{n}" for n in numbers[i : i + 10]) for i in range(0, words, 10)]
    path.write_text("\n\n".join(paragraphs))
    return str(path)


def written_by(model: Any, windows: int, tokens: int) -> torch.Tensor:
    """Token ids (windows, tokens) that a model wrote."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ids = tiny_ids(windows=windows, seq=1)
        for _ in range(tokens - 1):
            following = torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1, generator=draw)
            ids = torch.cat([ids, following], 1)
    return ids
