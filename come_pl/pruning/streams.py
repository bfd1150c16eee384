"""Where the streams between layers are kept from one calibration pass to the next: memory, files, or both.

What comes back is what was put in, bit for bit, in the model's dtype. A block is one batch's: in memory one tensor,
filled again in each pass, because many small ones would leave the heap in pieces (twice the memory, measured with
glibc); in a file one boundary after another.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from come_pl.tensors import Scratch, raw, read_into

Cache = Literal["ram", "disk", "none"]


class Block:
    """The streams (batch, seq, hidden) of one batch at each boundary, in memory."""

    def __init__(self, boundaries: int, like: Tensor):
        self.kept = torch.empty((boundaries, *like.shape), dtype=like.dtype, device="cpu")

    def __setitem__(self, boundary: int, stream: Tensor) -> None:
        self.kept[boundary].copy_(stream)

    def __getitem__(self, boundary: int) -> Tensor:
        """On the CPU; setting it again may change what was got."""
        return self.kept[boundary]


class FileBlock(Block):
    """The same in a file; a forward writes to it as it goes, so that one stream is in memory at a time."""

    def __init__(self, boundaries: int, like: Tensor, scratch: Scratch):
        self.shape, self.dtype, self.size = like.shape, like.dtype, like.nbytes
        self.file = scratch.file(self)
        with open(self.file, "wb") as opened:
            opened.truncate(boundaries * self.size)

    def __setitem__(self, boundary: int, stream: Tensor) -> None:
        assert stream.dtype == self.dtype, "streams are in the model's dtype"
        with open(self.file, "r+b") as opened:
            opened.seek(boundary * self.size)
            opened.write(raw(stream.detach().cpu().contiguous()))

    def __getitem__(self, boundary: int) -> Tensor:
        stream = torch.empty(self.shape, dtype=self.dtype)
        read_into(stream, self.file, boundary * self.size)
        return stream


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
