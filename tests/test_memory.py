"""What is freed is used again: counted in page faults of a process of its own, as the settings are the process's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from cli import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")

FAULTS = """
import resource, sys, torch
from come_pl import memory
getattr(memory, sys.argv[1])()
def work():
    for _ in range(10):
        held = [torch.empty(4 * 2**20).fill_(1.0) for _ in range(6)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# blocks are freed below one that stays, so that only `give_back` can return them
RESIDENT = """
import resource, torch
from come_pl import memory
memory.reuse()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
held = [torch.empty(4 * 2**20).fill_(1.0) for _ in range(7)]
held[:6] = []
before = resident()
memory.give_back()
print(before - resident())
"""


def printed(script: str, *arguments: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return int(found.stdout)


def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    """What glibc does unasked depends on what lies on top of the heap, so only the two settings are compared."""
    assert printed(FAULTS, "reuse") * 10 < printed(FAULTS, "map_large")


def test_what_is_free_goes_back() -> None:
    assert printed(RESIDENT) > 5 * 16 * 2**20
