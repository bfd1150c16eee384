"""Running the command line as a user does, on tiny checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run(script: str, *arguments: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository's top level; output is captured."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def kill_when(condition: Callable[[], bool], script: str, *arguments: object, cwd: Path, timeout: float = 300) -> None:
    """Start a script and kill -9 it, with everything that it started, as soon as `condition` holds."""
    process = subprocess.Popen(
        command(script, *arguments),
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the condition to kill at never came"
        time.sleep(0.001)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def exit_code(main: Callable[[], None], program: str, *words: object, monkeypatch: Any) -> int:
    """Call a console script's function as the command line does."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def is_one_line(error: str, expected: str) -> bool:
    """Whether what was written to stderr is one error line that says `expected`."""
    return expected in error and error.strip().count("\n") == 0 and error.startswith("error: ")


def records(folder: Path) -> list[dict]:
    """The steps of a run without what a clock or the memory decides."""
    steps = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    return [{k: v for k, v in step.items() if k not in ("seconds", "peak_gib")} for step in steps]
