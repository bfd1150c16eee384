"""Where the streams between layers are kept from one calibration pass to the next: memory, files, or both.

What comes back is what was put in, bit for bit, in the model's dtype. A block is one batch's: in memory one tensor,
filled again in each pass, because many small ones would leave the heap in pieces (twice the memory, measured with
glibc); in a file one boundary after another.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from come_pl.tensors import Scratch, raw, read_into

Cache = Literal["ram", "disk", "none"]


class Block:
    """The streams (batch, seq, hidden) of one batch at some boundaries, in memory."""

    def __init__(self, boundaries: int, like: Tensor):
        self.kept = torch.empty((boundaries, *like.shape), dtype=like.dtype, device="cpu")
        self._places: dict[int, int] = {}
        self._free = list(range(boundaries))  # the system gives memory to those that were used

    @property
    def held(self) -> Collection[int]:
        """Boundaries that have been set."""
        return self._places.keys()

    def up_to(self, boundary: int) -> int:
        """The highest boundary up to this one that has been set; −1: none."""
        return max((b for b in self.held if b <= boundary), default=-1)

    def __setitem__(self, boundary: int, stream: Tensor) -> None:
        if boundary not in self._places:
            self._places[boundary] = heapq.heappop(self._free)
        self.kept[self._places[boundary]].copy_(stream)

    def __getitem__(self, boundary: int) -> Tensor:
        """On the CPU; setting it again, or another once it is dropped, may change what was got."""
        return self.kept[self._places[boundary]]

    def drop(self, boundary: int) -> None:
        """Make room for another."""
        heapq.heappush(self._free, self._places.pop(boundary))


class FileBlock(Block):
    """The same in a file; a forward writes to it as it goes, so that one stream is in memory at a time."""

    def __init__(self, boundaries: int, like: Tensor, scratch: Scratch):
        self.shape, self.dtype, self.size = like.shape, like.dtype, like.nbytes
        self._written: set[int] = set()
        self.file = scratch.file(self)
        with open(self.file, "wb") as opened:
            opened.truncate(boundaries * self.size)

    @property
    def held(self) -> Collection[int]:
        return self._written

    def __setitem__(self, boundary: int, stream: Tensor) -> None:
        assert stream.dtype == self.dtype, "streams are in the model's dtype"
        with open(self.file, "r+b") as opened:
            opened.seek(boundary * self.size)
            opened.write(raw(stream.detach().cpu().contiguous()))
        self._written.add(boundary)

    def __getitem__(self, boundary: int) -> Tensor:
        stream = torch.empty(self.shape, dtype=self.dtype)
        read_into(stream, self.file, boundary * self.size)
        return stream

    def drop(self, boundary: int) -> None:
        self._written.remove(boundary)


class Streams:
    """Makes blocks: in memory until the budget is spent, then in files.

    Args:
        budget_gib: of memory; 0 keeps everything in files.
        scratch: folder of the files.
    """

    def __init__(self, budget_gib: float = math.inf, scratch: Scratch | None = None):
        self.left = budget_gib * 2**30
        self.scratch = scratch or Scratch()

    def block(self, boundaries: int, like: Tensor) -> Block:
        """Room for so many streams of the shape and dtype of `like`."""
        if boundaries * like.nbytes > self.left:
            return FileBlock(boundaries, like, self.scratch)
        self.left -= boundaries * like.nbytes
        return Block(boundaries, like)
