"""Matrices that are in memory only while they are used.

A stored parameter keeps its identity, shape, dtype and device, and is a single NaN, spread out, while its content is in
a file (or, for an accelerator, in the memory of the host). Forward hooks of the module that owns it bring it in and let
it go: one matrix at a time. Other code that reads a parameter does so inside `present`, which does nothing for an
ordinary one. What was forgotten there becomes NaN, and the run stops.

Vectors (norms, biases) are not worth it and stay where they are. Since `surgery.share` gives teacher and student the
very same parameters, each counts its users.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from come_pl import tensors
from come_pl.tensors import Entry, Scratch

Offload = Literal["none", "cpu", "disk"]
SHARD_BYTES = 4 * 2**30  # of the files that a model is saved in which is not in memory


class Store:
    """Where stored parameters are.

    Args:
        scratch: of the files of new parameters; None keeps them in the memory of the host.
    """

    def __init__(self, scratch: Scratch | None):
        self.scratch = scratch
        self.bytes_now = self.bytes_peak = 0  # of stored parameters that are in memory

    def put(self, parameter: nn.Parameter, source: Entry | Tensor | None = None) -> None:
        """Let go of a parameter's content, which is in `source`, or is first written to one."""
        parameter.stored = _Stored(self._written(parameter) if source is None else source, self)  # type: ignore[attr-defined]
        _let_go(parameter)

    def _written(self, parameter: nn.Parameter) -> Entry | Tensor:
        if self.scratch is None:
            return parameter.detach().cpu()
        file = self.scratch.file(parameter)
        tensors.write(file, {"content": parameter})
        return tensors.entries(file)["content"]


@dataclass
class _Stored:
    source: Entry | Tensor
    store: Store
    users: int = 0

    def acquire(self, parameter: nn.Parameter) -> None:
        if self.users == 0:
            with torch.inference_mode(False):  # a parameter stays one that autograd may use
                content = self.source if isinstance(self.source, Tensor) else self.source.read()
                parameter.data = content.to(parameter.device, parameter.dtype)
            self.store.bytes_now += parameter.nbytes
            self.store.bytes_peak = max(self.store.bytes_peak, self.store.bytes_now)
        self.users += 1

    def release(self, parameter: nn.Parameter) -> None:
        if self.users == 0:  # its module's pre-hook failed
            return
        self.users -= 1
        if self.users == 0:
            self.store.bytes_now -= parameter.nbytes
            _let_go(parameter)


def absent(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """What a stored parameter is while its content is elsewhere."""
    return _nothing(dtype, device).expand(shape)


@functools.cache  # one for all: small ones between matrices that come and go would keep the heap's holes apart
def _nothing(dtype: torch.dtype, device: torch.device | None) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), torch.nan, dtype=dtype, device=device)


def _let_go(parameter: nn.Parameter, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
    with torch.inference_mode(False):
        parameter.data = absent(parameter.shape, dtype or parameter.dtype, device or parameter.device)


def stored(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module that are stored."""
    return [p for p in module.parameters() if hasattr(p, "stored")]


def take_back(parameter: nn.Parameter) -> None:
    """Bring a stored parameter in, to stay."""
    parameter.stored.acquire(parameter)  # type: ignore[attr-defined]
    del parameter.stored  # type: ignore[attr-defined]


@contextlib.contextmanager
def present(*things: nn.Module | Tensor) -> Iterator[None]:
    """Within it parameters, and all those of modules, are in memory.

    Raises:
        TensorFileError: the file that one is in is gone or damaged.
    """
    with contextlib.ExitStack() as stack:
        for thing in things:
            for parameter in thing.parameters() if isinstance(thing, nn.Module) else [thing]:
                if hasattr(parameter, "stored"):
                    parameter.stored.acquire(parameter)
                    stack.callback(parameter.stored.release, parameter)
        yield


# plain functions: a deep copy of a module has them too


def _fetch(module: nn.Module, args: tuple) -> None:
    for parameter in module.parameters(recurse=False):
        if hasattr(parameter, "stored"):
            parameter.stored.acquire(parameter)


def _free(module: nn.Module, args: tuple, output: Any) -> None:
    for parameter in module.parameters(recurse=False):
        if hasattr(parameter, "stored"):
            parameter.stored.release(parameter)


def matrices(layer: nn.Module) -> list[nn.Parameter]:
    """What is stored of a layer."""
    return [p for p in layer.parameters() if p.dim() >= 2]


def watch(layers: Iterable[nn.Module]) -> None:
    """Bring the matrices of layers in for the forward of the modules that own them."""
    for layer in layers:
        for module in layer.modules():
            if any(p.dim() >= 2 for p in module.parameters(recurse=False)):
                module.register_forward_pre_hook(_fetch)
                module.register_forward_hook(_free, always_call=True)


def adopt(new: nn.Module | nn.Parameter, like: nn.Module | Tensor) -> None:
    """Store new parameters where those of `like` are stored; nothing where they are not."""
    others = stored(like) if isinstance(like, nn.Module) else [like] if hasattr(like, "stored") else []
    if not others:
        return
    store = others[0].stored.store  # type: ignore[union-attr]
    for parameter in matrices(new) if isinstance(new, nn.Module) else [new]:
        if not hasattr(parameter, "stored"):
            store.put(parameter)


def copied(layer: nn.Module, shared: Any) -> Any:
    """A layer with parameters of its own, in memory; it refers to the very same `shared` object (the config)."""
    memo: dict[int, Any] = {id(shared): shared}
    for parameter in stored(layer):
        with present(parameter):
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(layer, memo)


@contextlib.contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Within it a model may be moved to another device: stored parameters are out of sight, and follow at the end."""
    owners = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if hasattr(parameter, "stored")
    ]
    for module, name, _ in owners:
        module._parameters[name] = None
    try:
        yield
    finally:
        other = next(model.parameters(), None)
        for module, name, parameter in owners:
            assert parameter is not None
            module._parameters[name] = parameter
            if other is not None and parameter.device != other.device:
                _let_go(parameter, other.device)


Tables = list[tuple[nn.Module, str, Tensor]]


def tables(model: nn.Module) -> Tables:
    """The rotary tables, which a model is loaded with in fp32 whatever its dtype. In bf16 a position of some thousand
    is off by up to a radian."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and "inv_freq" in name  # as transformers calls them
    ]


def put_tables(kept: Tables) -> None:
    """These again, where the modules are now."""
    for module, name, buffer in kept:
        now = module._buffers[name]
        assert now is not None
        module._buffers[name] = buffer.to(now.device)


def move(model: Any, target: torch.device | torch.dtype | str) -> Any:
    """The model on another device or, from now on, in another dtype (but for its `tables`)."""
    kept = tables(model)
    with aside(model):
        model.to(target)
    if isinstance(target, torch.dtype):
        put_tables(kept)
        for parameter in stored(model):
            _let_go(parameter, dtype=target)
    return model


def keep_on_host(layers: nn.ModuleList) -> None:
    """The matrices of decoder layers are given to an accelerator only for the forward of their modules."""
    store = Store(None)
    for parameter in matrices(layers):
        store.put(parameter)
    watch(layers)


class EmptyOnMeta(TorchFunctionMode):
    """Within it `torch.empty`, which weights begin as, takes no memory: the heap would keep holes of their sizes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        meta = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **((kwargs or {}) | meta))


def save_shards(model: Any, folder: Path) -> None:
    """What `model.save_pretrained` writes, with one matrix of a stored model in memory at a time."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    names: dict[int, str] = {}  # of tied weights the first, as stock checkpoints have it
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if names[id(t)] == name}
    parts = tensors.shards(state, SHARD_BYTES)
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        tensors.write(folder / file, part, present)
    if len(parts) > 1:
        sizes = {
            "total_parameters": sum(p.numel() for p in model.parameters()),
            "total_size": sum(t.nbytes for t in state.values()),
        }
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n", encoding="utf-8")
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
