"""When the C library gives memory back to the system.

By default glibc returns the largest free blocks at once, and a forward that allocates its activations anew in each
layer gets every page of them from the system again: on a CPU a quarter of the time of a pass. These settings are those
of the process. Another C library, another system: nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2**30  # bytes


def reuse() -> None:
    """From here on what is freed stays with the process, and is used again without asking the system."""
    _glibc("mallopt", M_TRIM_THRESHOLD, LARGE)
    _glibc("mallopt", M_MMAP_THRESHOLD, LARGE)


def map_large() -> None:
    """From here on each block above 1 MiB goes back at once: matrices that come and go leave no holes."""
    _glibc("mallopt", M_MMAP_THRESHOLD, 2**20)


def give_back() -> None:
    """What is free goes back to the system."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), name)(*arguments)
