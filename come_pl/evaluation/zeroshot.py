"""Multiple-choice tasks through lm-eval, in process, on a model that is loaded already.

lm-eval is an optional extra (`pip install 'come_pl[eval]'`). The scores are those of its command line on the same
checkpoint in the same dtype: same prompts, tokenizer settings and seeds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

from come_pl.errors import did_you_mean

TASKS = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande", "mmlu")
MMLU_SHOTS = 5  # as published; the others have no examples
METRICS = ("acc_norm", "acc")  # accuracy by length-normalised likelihood where the task has it


class TaskError(ValueError):
    """A task that cannot be run; the message is one line that says what to do."""


@dataclass(frozen=True)
class TaskName:
    """A task or group of lm-eval and its number of examples in the prompt."""

    name: str
    shots: int

    def __str__(self) -> str:
        return f"{self.name} ({self.shots}-shot)" if self.shots else self.name


def read_task(text: str) -> TaskName:
    """`NAME` or `NAME=SHOTS`; without a number five for MMLU and none for the others. Raises TaskError."""
    name, equals, shots = text.partition("=")
    if not name or (equals and not shots.isdecimal()):
        raise TaskError(f"task {text!r}: expected NAME or NAME=SHOTS, a task of lm-eval and a number of examples")
    return TaskName(name, int(shots) if equals else MMLU_SHOTS if name.startswith("mmlu") else 0)


@dataclass(frozen=True)
class Score:
    """What a model reached in a task.

    Attributes:
        metric: `acc_norm` where the task has it, else `acc`.
        score: between 0 and 1.
        stderr: standard error of the score; None where lm-eval gives none (a single sample).
        samples: questions asked.
    """

    metric: str
    score: float
    stderr: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lm_eval_version() -> str:
    """Raises TaskError: lm-eval is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise TaskError(
            "zero-shot tasks need lm-eval, which is not installed: pip install 'come_pl[eval]', or give --tasks none"
        ) from None


class TaskRunner:
    """Tasks of lm-eval, and of a folder with task files of one's own, which need no network if their data does not.

    Args:
        tasks: what is going to be run.
        include_path: folder with task YAML files; `local` are the tasks asked for that are in it.

    Raises:
        TaskError: lm-eval is not installed, no such folder, a task that nobody knows, or a tag.
    """

    def __init__(self, tasks: Sequence[TaskName], include_path: Path | None = None):
        self.version = lm_eval_version()
        if include_path is not None and not include_path.is_dir():
            raise TaskError(f"include_path {str(include_path)!r} is no folder; expected one with lm-eval task files")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant so: a model already loaded
        from lm_eval.tasks import TaskManager

        self.include_path = include_path
        self.local: frozenset[str] = frozenset()
        names = [task.name for task in tasks]
        needed = set(names)
        if include_path is not None:
            self.manager = TaskManager(include_path=str(include_path), include_defaults=False)
            self.local = frozenset(names) & frozenset(self.manager.all_tasks)
            needed |= _members(self.local, include_path)
        if include_path is None or not needed <= set(self.manager.all_tasks):  # else not: lm-eval's own are thousands
            self.manager = TaskManager(include_path=None if include_path is None else str(include_path))
        known = self.manager.all_tasks
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise TaskError(
                    f"task {name!r} is not known to lm-eval {self.version}{hint} (--include_path adds a folder)"
                )
            if name in self.manager.all_tags:
                entry: Any = self.manager.task_index[name]  # a dictionary in older versions
                tasks = sorted(entry["task"] if isinstance(entry, dict) else entry.tags)
                more = ", …" if len(tasks) > 5 else ""
                raise TaskError(
                    f"task {name!r} is a tag, which has no score of its own; expected tasks or groups, as those that "
                    f"have it: {', '.join(tasks[:5])}{more}"
                )

    def identity(self, task: TaskName) -> dict[str, Any]:
        """What a score depends on beside the model: a task of one's own is known by its files."""
        found = {"task": task.name, "shots": task.shots, "lm_eval": self.version}
        return found | ({"files": self._content} if task.name in self.local else {})

    @cached_property
    def _content(self) -> str:
        """sha256 of the folder's files, but for hidden ones and what Python keeps of its own."""
        assert self.include_path is not None
        content = hashlib.sha256()
        for file in sorted(self.include_path.rglob("*")):
            name = file.relative_to(self.include_path)
            if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
                content.update(str(name).encode() + file.read_bytes())
        return content.hexdigest()

    def score(
        self, model: Any, tokenizer: Any, task: TaskName, *, limit: int | None = None, batch_size: int = 4
    ) -> Score:
        """Run a task or group, on the device that the model is on.

        Args:
            limit: questions of each task (of each subject of a group); all without it.

        Raises:
            TaskError: its data cannot be read, its files are broken, or it has no accuracy.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            found: Any = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=[task.name],
                num_fewshot=task.shots,
                limit=limit,
                task_manager=self.manager,
                log_samples=False,
            )
        except Exception as error:  # data that is not there, or whatever a broken task file runs into
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise TaskError(f"task {task.name!r} cannot be run: {type(error).__name__}: {first.strip()}") from error
        entry = found["results"].get(task.name) or found.get("groups", {}).get(task.name, {})
        metric = next((metric for metric in METRICS if f"{metric},none" in entry), None)
        if metric is None:
            raise TaskError(f"task {task.name!r} has no accuracy ({' or '.join(METRICS)}) to report")
        stderr = entry.get(f"{metric}_stderr,none")
        return Score(
            metric,
            float(entry[f"{metric},none"]),
            float(stderr) if isinstance(stderr, int | float) else None,
            sum(count["effective"] for count in found["n-samples"].values()),
        )


def mean_score(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of the scores of several tasks, with its standard error."""
    error = math.hypot(*(score.get("stderr") or 0.0 for score in scores)) / len(scores)
    return {"score": mean(score["score"] for score in scores), "stderr": error}


def _members(names: Collection[str], folder: Path) -> set[str]:
    """What the task files of a folder say that groups consist of, down to tasks, of those that are in `names`."""
    import yaml

    class Reader(yaml.SafeLoader):
        """Takes tags such as !function for nothing."""

    Reader.add_multi_constructor("!", lambda *_: None)
    listed: dict[str, Any] = {}
    for file in folder.rglob("*.yaml"):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # lm-eval leaves them out too
            content = yaml.load(file.read_text(encoding="utf-8"), Reader)
            if isinstance(content, dict) and isinstance(content.get("group"), str):
                listed[content["group"]] = content.get("task")
    found: set[str] = set()
    pending: list[Any] = list(names)
    while pending:
        item = pending.pop()
        if isinstance(item, str) and item not in found:
            found.add(item)
            item = listed.get(item)
        if isinstance(item, dict):
            item = [item.get("group"), item.get("task")]
        if isinstance(item, list):
            pending += item
    return found
