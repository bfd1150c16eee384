"""The same tasks by `come-eval` and by lm-eval's own command line, on the same folders: are the numbers equal?

    python -m benchmarks.zeroshot --models DENSE PRUNED RECOVERED --include_path FOLDER --tasks arc_easy_offline … \
        --limit 100

Writes CSV (one row a model and task: both scores, their standard errors, the questions) and exits with 1 if any score
differs. Both are processes of their own; dtype, batch size and examples are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from come_pl.evaluation.zeroshot import TASKS, TaskName, read_task
from come_pl.models import locate
from come_pl.workflows.tables import markdown, write_csv

COLUMNS = ["model", "task", "shots", "questions", "metric", "come_eval", "lm_eval", "stderr", "lm_eval_stderr", "equal"]


def ours(model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Scores of `come-eval`, by task."""
    file = folder / "eval.json"
    command = [sys.executable, "-m", "come_pl.evaluation", model, "--texts", "none", "--output", str(file)]
    command += ["--tasks", *arguments.tasks, "--dtype", arguments.dtype, "--batch_size", str(arguments.batch_size)]
    command += ["--device", arguments.device, "--cache", str(folder / "cache")]
    command += ["--include_path", arguments.include_path] if arguments.include_path else []
    command += ["--limit", str(arguments.limit)] if arguments.limit else []
    subprocess.run(command, check=True)
    return json.loads(file.read_text())["tasks"]


def theirs(model: str, task: TaskName, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What lm-eval's command line writes of a task."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", task.name, "--output_path", str(folder)]
    command += ["--model_args", f"pretrained={locate(model).path},dtype={arguments.dtype}"]
    command += ["--num_fewshot", str(task.shots), "--device", arguments.device]
    command += ["--batch_size", str(arguments.batch_size)]
    command += ["--include_path", arguments.include_path] if arguments.include_path else []
    command += ["--limit", str(arguments.limit)] if arguments.limit else []
    subprocess.run(command, check=True)
    file = max(folder.rglob("results*.json"), key=lambda found: found.stat().st_mtime_ns)
    found = json.loads(file.read_text())
    return found["results"].get(task.name) or found["groups"][task.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of checkpoints or run folders")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="NAME or NAME=SHOTS")
    parser.add_argument("--include_path", help="folder with task files of one's own")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/zeroshot.csv"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            found = ours(model, arguments, Path(scratch))
            for text in arguments.tasks:
                task = read_task(text)
                mine, other = found[task.name]["model"], theirs(model, task, arguments, Path(scratch) / task.name)
                score, error = (other.get(f"{mine['metric']}{part},none") for part in ("", "_stderr"))
                error = error if isinstance(error, float) else None  # "N/A" where it has none
                row = [Path(model).name, task.name, task.shots, mine["samples"], mine["metric"], mine["score"], score]
                row += [mine["stderr"], error, mine["score"] == score and mine["stderr"] == error]
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                write_csv(arguments.out, COLUMNS, rows)
    print(markdown(COLUMNS, [[row[c] for c in COLUMNS] for row in rows]))
    if not all(row["equal"] for row in rows):
        raise SystemExit("error: scores differ")


if __name__ == "__main__":
    main()
