"""Safetensors files, one tensor at a time.

Only the bytes of the tensor that is asked for are read or written, and no file is mapped into memory: limits on
resident memory and on address space hold both.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFileError(ValueError):
    """A file of tensors that is missing, damaged or of an unknown kind; the message is one line."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: where its bytes begin, its shape and dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Raises TensorFileError: the file is gone or too short."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        read_into(tensor, self.file, self.offset)
        return tensor


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, read when they are asked for.

    Raises:
        TensorFileError: not a safetensors file, cut short, or a dtype that is not known.
    """

    def __init__(self, file: Path):
        self.entries = entries(file)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, shared with it."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def read_into(tensor: Tensor, file: Path, offset: int) -> None:
    """Fill a contiguous tensor on the CPU with the bytes from `offset` on."""
    view = raw(tensor)
    done = 0
    try:
        with open(file, "rb", buffering=0) as opened:
            opened.seek(offset)
            while done < len(view):  # the system reads 2 GiB at once at the most
                count = opened.readinto(view[done:])
                if not count:
                    raise TensorFileError(f"{str(file)!r} is cut short or was changed while it was read")
                done += count
    except OSError as error:
        raise TensorFileError(f"{str(file)!r} cannot be read ({error.strerror})") from None


def entries(file: Path) -> dict[str, Entry]:
    """What a safetensors file holds, from its header alone.

    Raises:
        TensorFileError: see `TensorFile`.
    """
    try:
        with open(file, "rb") as opened:
            size = file.stat().st_size
            length = int.from_bytes(opened.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is cut short")
            header = json.loads(opened.read(length))
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of dtype {entry['dtype']}")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"it ends before {name} does")
            found[name] = Entry(file, 8 + length + begin, shape, dtype)
        return found
    except OSError as error:
        raise TensorFileError(f"{str(file)!r} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{str(file)!r} is no whole safetensors file: {error}") from None


class Scratch:
    """A folder of files that do not outlive the run.

    Args:
        folder: emptied; by default a temporary one.
    """

    def __init__(self, folder: Path | None = None):
        self._folder, self._count = folder, 0
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def file(self, owner: Any) -> Path:
        """A path for a new file, which is removed together with its owner."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="come_pl-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._count += 1
        file = self._folder / f"{self._count:06d}"
        weakref.finalize(owner, file.unlink, missing_ok=True)
        return file


Presence = Callable[[Tensor], contextlib.AbstractContextManager[Any]]


def write(file: Path, tensors: Mapping[str, Tensor], present: Presence = contextlib.nullcontext) -> None:
    """Write a safetensors file.

    Args:
        present: a context in which a tensor's content is in memory; one is open at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open(file, "wb", buffering=0) as opened:
        _write_all(opened, len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            with present(tensor):
                _write_all(opened, raw(tensor.detach().cpu().contiguous()))


def _write_all(opened: Any, data: bytes | memoryview) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += opened.write(view[done:])


def shards(tensors: Mapping[str, Tensor], limit_bytes: int) -> list[dict[str, Tensor]]:
    """The tensors in order, dealt into files of at most `limit_bytes` (more where one tensor alone is larger)."""
    found: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        own = tensor.numel() * tensor.element_size()
        if found[-1] and size + own > limit_bytes:
            found.append({})
            size = 0
        found[-1][name] = tensor
        size += own
    return found
