"""What is freed is used again: counted in page faults of a process of its own, as the settings are the process's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from cli import ROOT

SCRIPT = """
import resource, sys, torch
from come_pl import memory
if sys.argv[1] != "as it is":
    getattr(memory, sys.argv[1])()
def work():
    for _ in range(10):
        held = [torch.empty(4 * 2**20).fill_(1.0) for _ in range(6)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(setting: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, setting], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    kept, plain, mapped = faults("reuse"), faults("as it is"), faults("map_large")
    assert kept * 10 < min(plain, mapped)
    assert faults("give_back") > kept * 10, "giving back once changes nothing for what comes after"
