"""Every distillation at equal tokens, and at equal seconds: `python -m benchmarks.recover --student RUN_FOLDER`.

    python -m benchmarks.recover --start plain refit --source FILE --evaluation FILE --tokens 262144 --seconds 600
    python -m benchmarks.recover --student RUN_FOLDER --methods mp kd -- --model.lr 1e-4

`--start` prunes the model first, as `plain` CoMe and as prune.py does by default, with its `refit`; without it all
methods start from `--student`, or the newest pruned run. Writes OUTPUT/start-START/ and OUTPUT/START-METHOD-TOKENS/
(run folders), and after every run OUTPUT/recover.md, recover.csv and recover.json. A finished run is not run again, one
that was cut off goes on, so the same command continues after a kill. With `--seconds S` a second table gives each
method as many tokens as it trains on in S seconds at the speed that the first one measured. What follows `--` goes to
every training run. A run that fails is told and left out; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from come_pl.record import write_atomically
from come_pl.workflows.tables import markdown, write_csv, write_json

ROOT = Path(__file__).parents[1]
METHODS = ("mp", "sp", "kd", "lora", "lm", "hybrid")
STARTS = {"plain": ["--method", "come", "--refit", "none"], "refit": []}


def call(script: str, *words: object) -> int:
    """Runs a script of the repository's top level; its exit code."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, words)]).returncode


def pruned(arguments: argparse.Namespace, start: str) -> str | None:
    """The run folder that a start is, made if need be; None: pruning failed."""
    if start == "given":
        return arguments.student
    folder = arguments.output / f"start-{start}"
    words = ["--output", folder, "--model.path", arguments.model, "--data.calibration", arguments.source]
    words += ["--evaluation.data", arguments.evaluation, "--samples", "false", *STARTS[start]]
    words += ["--data.tokens", arguments.calibration_tokens, "--data.seqlen", arguments.seqlen]
    words += ["--evaluation.tokens", arguments.evaluation_tokens, "--seed", arguments.seed]
    if arguments.target_layers:
        words += ["--target_layers", arguments.target_layers]
    return str(folder) if call("prune.py", *words) == 0 else None


def distil(arguments: argparse.Namespace, start: str, student: str | None, method: str, tokens: int) -> Any:
    """What `run.json` says of one training run, or None if it failed."""
    folder = arguments.output / f"{start}-{method}-{tokens}"
    words = ["--distill", method, "--output", folder, "--data.source", arguments.source, "--data.tokens", tokens]
    words += ["--data.seqlen", arguments.seqlen, "--data.batch_size", arguments.batch_size, "--samples", "false"]
    words += ["--evaluation.data", arguments.evaluation, "--evaluation.tokens", arguments.evaluation_tokens]
    words += ["--seed", arguments.seed, *(["--student", student] if student else []), *arguments.more]
    return json.loads((folder / "run.json").read_text()) if call("train.py", *words) == 0 else None


def row(start: str, method: str, info: dict[str, Any]) -> dict[str, Any]:
    entry = next(iter(info["perplexity"].values()))
    return {
        "start": start,
        "method": method,
        "tokens": info["tokens_seen"],
        "seconds": info["seconds"],
        "before": round(entry["before"], 3),
        "perplexity": round(entry["after"], 3),
        "times_dense": round(entry["after"] / entry["dense"], 3),
        "trained_parameters": info["trained_parameters"],
        "tokens_per_second": info["tokens_per_second"],
        "peak_gib": info["peak_gib"],
    }


def table(rows: list[dict[str, Any]], title: str) -> str:
    return f"## {title}\n\n" + markdown(list(rows[0]), [list(r.values()) for r in rows])


def write(output: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    found = {title: rows for title, rows in results.items() if rows}
    write_json(output / "recover.json", found)
    text = "\n".join(table(rows, title) for title, rows in found.items())
    write_atomically(output / "recover.md", "# Recovery of a pruned model\n\n" + text)
    rows = [{"table": title} | r for title, rows in found.items() for r in rows]
    write_csv(output / "recover.csv", list(rows[0]), rows)


def read(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="run folder of prune.py; by default the newest")
    parser.add_argument("--start", nargs="+", choices=STARTS, help="prune first, without and with closed-form repair")
    parser.add_argument("--model", default="embedded", help="dense model that --start prunes")
    parser.add_argument("--target_layers", type=int, help="depth that --start prunes to")
    parser.add_argument("--calibration_tokens", type=int, default=16384, help="for --start")
    parser.add_argument("--source", default="embedded", help="text to distil on")
    parser.add_argument("--evaluation", default="embedded", help="held-out text")
    parser.add_argument("--evaluation_tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=262144, help="for each method")
    parser.add_argument("--seconds", type=float, help="also compare at this many seconds of training")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window")
    parser.add_argument("--batch_size", type=int, default=4, help="windows in a batch")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--output", type=Path, default=Path("runs/recover"))
    parser.add_argument("--seed", type=int, default=0)
    words = sys.argv[1:] if words is None else words
    at = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:at])
    arguments.more = words[at + 1 :]
    if arguments.student and arguments.start:
        parser.error("--student and --start are both given; give one")
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds {arguments.seconds}: expected more than 0")
    return arguments


def main() -> int:
    arguments = read()
    step = arguments.seqlen * arguments.batch_size
    by_tokens, by_seconds = f"Equal tokens: {arguments.tokens}", f"Equal seconds: {arguments.seconds or 0:g}"
    results: dict[str, list[dict[str, Any]]] = {by_tokens: [], by_seconds: []}
    failed: list[str] = []

    def measure(title: str, start: str, student: str | None, method: str, tokens: int) -> None:
        info = distil(arguments, start, student, method, tokens)
        if info is None:
            failed.append(f"{start}-{method}-{tokens}")
        else:
            results[title].append(row(start, method, info))
            write(arguments.output, results)

    students: dict[str, str | None] = {}
    for start in arguments.start or ["given"]:
        students[start] = pruned(arguments, start)
        if students[start] is None and start != "given":
            failed.append(f"start-{start}")
            del students[start]
    for start, student in students.items():
        for method in arguments.methods:
            measure(by_tokens, start, student, method, arguments.tokens)
    for measured in list(results[by_tokens]) if arguments.seconds else []:
        tokens = max(1, int(measured["tokens_per_second"] * arguments.seconds) // step) * step
        measure(by_seconds, measured["start"], students[measured["start"]], measured["method"], tokens)
    if (arguments.output / "recover.md").is_file():
        print((arguments.output / "recover.md").read_text())
    if failed:
        print(f"failed, and left out: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
