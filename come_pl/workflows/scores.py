"""Tasks of the models that `come-compare` makes: `come-eval` in a process of its own for each, beside the dense one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from come_pl.evaluation.zeroshot import TaskName, TaskRunner, read_task
from come_pl.runs import read_run
from come_pl.workflows.evaluate import average

Start = Callable[[Sequence[str], Path, str], str | None]  # (arguments, log, module) → its last error line if it fails


@dataclass(frozen=True)
class Scoring:
    """What is asked of every model.

    Args:
        tasks: NAME or NAME=SHOTS, each once.
        dense: the dense model, as `prune.py` takes it.
        cache: folder of results, so that the dense model is asked once.
        start: how a process is started.

    Raises:
        TaskError: lm-eval is not installed, no such folder, or a task that nobody knows.
    """

    tasks: Sequence[str]
    include_path: Path | None
    limit: int | None
    dense: str
    cache: Path
    start: Start

    def __post_init__(self) -> None:
        TaskRunner(self._names, self.include_path)

    @property
    def _names(self) -> list[TaskName]:
        return [read_task(task) for task in self.tasks]

    def missing(self, run: Path, depths: Iterable[int]) -> bool:
        """Whether a finished run lacks a score of one of its depths and the model to find it by."""
        return any(not self.known(run, depth) and not _model(run, depth).is_dir() for depth in depths)

    def known(self, run: Path, depth: int) -> dict[str, Any]:
        """What a row of the table says of a depth's tasks; empty: they are not all known."""
        try:
            found = json.loads(_file(run, depth).read_text(encoding="utf-8"))["tasks"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        asked = {}
        for name in self._names:
            task = found.get(name.name, {})
            if (task.get("shots"), task.get("limit")) != (name.shots, self.limit) or "dense" not in task:
                return {}
            asked[name.name] = task
        mean = average(asked)
        return {
            "score": mean["model"]["score"],
            "score_stderr": mean["model"]["stderr"],
            "dense_score": mean["dense"]["score"],
            "score_kept": mean["kept"],
            "tasks": {name: task["model"]["score"] for name, task in asked.items()},
        }

    def score(self, run: Path, depth: int, log: Path) -> str | None:
        """Ask the model of a depth, unless it was asked before; the last error line if that fails."""
        if self.known(run, depth):
            return None
        options: dict[str, Any] = {
            "--dense": self.dense,
            "--dtype": read_run(run)["model"]["dtype"],
            "--include_path": self.include_path,
            "--limit": self.limit,
            "--cache": self.cache,
            "--output": _file(run, depth),
        }
        words = [str(_model(run, depth)), "--texts=none", "--tasks", *self.tasks]
        words += [f"{name}={value}" for name, value in options.items() if value is not None]
        error = self.start(words, log, "come_pl.evaluation")
        return error or (None if self.known(run, depth) else "not all of its tasks have a score")


def _model(run: Path, depth: int) -> Path:
    return run / f"model{_of(run, depth)}"


def _file(run: Path, depth: int) -> Path:
    """That of the target depth is where a report of the run looks for it."""
    return run / f"eval{_of(run, depth)}.json"


def _of(run: Path, depth: int) -> str:
    """How names of what is of a depth on the way end."""
    return "" if depth == read_run(run)["target_layers"] else f"-{depth}"
