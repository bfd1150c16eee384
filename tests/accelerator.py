"""A pretended accelerator: tensors of the CPU of which some are taken to be on another device, so that code that mixes
the two, which only a real accelerator would refuse, is seen here."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")
MAY_MIX = {"copy_", "to", "cpu", "type_as", "__getitem__", "__setitem__", "index_put_"}  # or are looked at below


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


class Accelerator(TorchFunctionMode):
    """Within it `DEVICE` is a device.

    Attributes:
        mixed: where tensors of both were given to one operation: file:line, operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: set[str] = set()
        self._there: dict[int, Any] = {}  # storages, kept so that no other takes their address

    def put(self, *values: Tensor | nn.Module) -> None:
        """These are there."""
        for value in values:
            for tensor in [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]:
                storage = tensor.untyped_storage()
                if storage.data_ptr():
                    self._there[storage.data_ptr()] = storage

    def has(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self._there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._called(func, getattr(func, "__name__", ""), list(args), dict(kwargs or {}))

    def _called(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name == "__get__":
            of_device = getattr(getattr(func, "__self__", None), "__name__", "") == "device"
            return DEVICE if of_device and self.has(args[0]) else func(*args, **kwargs)
        given = list(_tensors([args, kwargs]))
        wanted: bool | None = None  # whether it is to be there
        for place in range(1, len(args)) if name == "to" else ():
            if isinstance(args[place], Tensor):
                wanted = self.has(args[place])
            elif isinstance(args[place], (torch.device, str)):
                wanted, args[place] = torch.device(args[place]).type == DEVICE.type, CPU
        if kwargs.get("device") is not None:
            wanted, kwargs["device"] = torch.device(kwargs["device"]).type == DEVICE.type, CPU
        wanted = False if name == "cpu" else wanted
        given = [tensor for tensor in given if tensor.numel()]  # nothing is everywhere
        own = [self.has(tensor) for tensor in given]
        # numbers of the CPU will do as well
        numbers = [tensor.dim() == 0 and name not in ("stack", "cat") for tensor in given]
        if name in ("__getitem__", "__setitem__", "index_put_"):  # indices of the CPU will do
            bad = bool(own) and not own[0] and any(own[1:])
        else:
            bad = name not in MAY_MIX and any(own) and not all(a or b for a, b in zip(own, numbers, strict=True))
        if bad:
            ours = [frame for frame in traceback.extract_stack() if "come_pl" in frame.filename.split("/")]
            self.mixed.add(f"{ours[-1].filename.split('/come_pl/')[-1]}:{ours[-1].lineno} {name}" if ours else name)
        found = func(*args, **kwargs)
        if name in ("to", "cpu") and wanted is not None and own and own[0] != wanted:
            found = found.clone() if found.data_ptr() == given[0].data_ptr() else found
        there = any(own) if wanted is None else wanted
        if name == "copy_":
            there = bool(given) and self.has(given[0])
        if there:
            self.put(*_tensors(found))
        return found
