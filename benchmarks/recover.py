"""Every distillation at equal tokens, and at equal seconds: `python benchmarks/recover.py --student RUN_FOLDER`.

Writes OUTPUT/METHOD-TOKENS/ (run folders), OUTPUT/recover.md and recover.json. A finished run is not run again, one
that was cut off goes on, so the same command continues after a kill. With `--seconds S` a second table gives each
method as many tokens as it trains on in S seconds at the speed that the first one measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METHODS = ("mp", "sp", "kd", "lora", "lm", "hybrid")


def distil(arguments: argparse.Namespace, method: str, tokens: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "train.py"), "--distill", method, "--output", str(folder)]
    command += ["--data.source", arguments.source, "--data.tokens", str(tokens), "--seed", str(arguments.seed)]
    command += ["--evaluation.data", arguments.evaluation]
    if arguments.student:
        command += ["--student", arguments.student]
    subprocess.run(command, check=True)
    return json.loads((folder / "run.json").read_text())


def row(method: str, info: dict[str, Any]) -> dict[str, Any]:
    entry = next(iter(info["perplexity"].values()))
    return {
        "method": method,
        "tokens": info["tokens_seen"],
        "seconds": info["seconds"],
        "before": entry["before"],
        "perplexity": entry["after"],
        "times_dense": round(entry["after"] / entry["dense"], 3),
        "trained_millions": round(info["trained_parameters"] / 1e6, 2),
        "tokens_per_second": info["tokens_per_second"],
        "peak_gib": info["peak_gib"],
    }


def table(rows: list[dict[str, Any]], title: str) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(v) for v in r.values()) + " |" for r in rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="run folder of prune.py; by default the newest")
    parser.add_argument("--source", default="embedded", help="text to distil on")
    parser.add_argument("--evaluation", default="embedded", help="held-out text")
    parser.add_argument("--tokens", type=int, default=262144, help="for each method")
    parser.add_argument("--seconds", type=float, help="also compare at this many seconds of training")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--output", type=Path, default=Path("runs/recover"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {f"Equal tokens: {arguments.tokens}": []}
    speeds: dict[str, float] = {}
    for method in arguments.methods:
        info = distil(arguments, method, arguments.tokens, arguments.output / f"{method}-{arguments.tokens}")
        speeds[method] = info["tokens_per_second"]
        next(iter(results.values())).append(row(method, info))
        write(arguments.output, results)
    if arguments.seconds:
        title = f"Equal seconds: {arguments.seconds:.0f}"
        results[title] = []
        for method in arguments.methods:
            tokens = max(2048, int(speeds[method] * arguments.seconds) // 2048 * 2048)
            info = distil(arguments, method, tokens, arguments.output / f"{method}-{tokens}")
            results[title].append(row(method, info))
            write(arguments.output, results)
    print((arguments.output / "recover.md").read_text())


def write(output: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "recover.json").write_text(json.dumps(results, indent=2) + "\n")
    text = "\n".join(table(rows, title) for title, rows in results.items() if rows)
    (output / "recover.md").write_text("# Recovery of a pruned model\n\n" + text)


if __name__ == "__main__":
    main()
