"""What our implementations cost beside the naive ones: seconds, passes through the layers, peak memory.

    python -m benchmarks.run --calibration FILE                            # the demo model, the first step of each row
    python -m benchmarks.run --model random:22x2048 --dtype bfloat16 --steps 2

Each row is one method on one model, ours and as in `benchmarks/naive.py`, on the same windows and for the same number
of steps, by turns, each time in a process of its own. `growth` is plain CoMe on random Llamas (`--growth`),
`statistics` the pass that CoMe's statistics are collected in, also told in units of the bare forward of the layers
(`bare`). `same`: steps with the same layers and ratio on both sides; the naive side of `come_p_coarse` tries every
ratio; it is run once for all rows of `come_p`, as those of `come` and `sleb` are.

A pass is a run of every decoder layer of the dense model over all calibration tokens, counted by hooks; what is run
after a step to monitor it is part of ours. A finished row of `--out` is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from come_pl.cli.common import quiet
from come_pl.pruning.methods.base import Method
from come_pl.pruning.methods.come import CoMe
from come_pl.pruning.methods.come_p import CoMeP
from come_pl.pruning.methods.sleb import SLEB
from come_pl.workflows.tables import markdown, write_csv

METHODS: dict[str, Method] = {
    "statistics": CoMe(select="span"),
    "come": CoMe(select="span"),
    "come_race": CoMe(select="span", race=True),
    "come_p": CoMeP(),
    "come_p_race": CoMeP(race=True),
    "come_p_coarse": CoMeP(search="coarse"),
    "come_p_coarse_race": CoMeP(search="coarse", race=True),
    "come_p_coarse_race_close": CoMeP(search="coarse", race=True, close=0.005),
    "sleb": SLEB(),
    "sleb_race": SLEB(race=True),
}
ROWS = (*METHODS, "growth")
SAME_NAIVE = ("come_p", "come", "sleb")  # rows that begin so have the naive side of this one
GROWTH = ("8x512@4096", "8x512@8192", "8x512@16384", "16x512@4096", "32x512@4096", "8x1024@4096", "8x2048@4096")
KEY = ["row", "model", "dtype", "naive_dtype", "calibration", "tokens", "seqlen", "steps", "threads", "monitor"]
COLUMNS = [
    *KEY,
    *("seconds", "naive_seconds", "ratio", "passes", "naive_passes", "head_passes", "naive_head_passes"),
    *("bare", "naive_bare", "peak_gib", "naive_peak_gib", "tokens_per_second", "same"),
]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", nargs="+", default=["embedded"], help="see benchmarks/measure.py")
    found.add_argument("--calibration", default="embedded", help="text; random models get random tokens")
    found.add_argument("--tokens", type=int, default=16384)
    found.add_argument("--seqlen", type=int, default=2048)
    found.add_argument("--steps", type=int, default=1, help="steps that are measured, of both sides")
    found.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=",".join(ROWS))
    found.add_argument("--growth", nargs="*", default=GROWTH, help="LAYERSxHIDDEN@TOKENS of the growth rows")
    found.add_argument("--dtype", default="float32", help="of ours: float32 or bfloat16")
    found.add_argument("--naive_dtype", default="float32", help="of the naive side, or none to leave it out")
    found.add_argument("--monitor", type=int, default=1, help="windows that ours is monitored on after each step")
    found.add_argument("--repeats", type=int, default=1, help="runs of each side; medians are told")
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.csv")
    found.add_argument("--one", help=argparse.SUPPRESS)  # one side of one row, as JSON
    return found


def one(task: dict[str, Any]) -> measure.Measured:
    """One side of one row, in this process."""
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(task["threads"])
    method, ours = METHODS["come" if task["row"] == "growth" else task["row"]], task["side"] == "ours"
    data = measure.calibration(task["model"], task["calibration"], task["tokens"], task["seqlen"])
    model = measure.load(task["model"], task["dtype"] if ours else task["naive_dtype"])
    if task["row"] == "statistics":
        return measure.statistics_pass(method, model, data, max(task["repeats"], 3), ours=ours)
    return measure.run(method, model, data, task["steps"], task["monitor"], ours=ours)


def measured(task: dict[str, Any], side: str) -> dict[str, Any]:
    """The same in a process of its own.

    Raises:
        BadBenchmark: it failed; its last line says why.
    """
    command = [sys.executable, "-m", "benchmarks.run", "--one", json.dumps(task | {"side": side})]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise measure.BadBenchmark(f"row {task['row']} of {task['model']}, {side}: {why}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(task: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both sides, by turns.

    Args:
        known: naive runs of rows before, which this one may share; its own are added.
    """
    sides: dict[str, list[dict[str, Any]]] = {"ours": []}
    if task["naive_dtype"] != "none":
        sides["naive"] = []
    for turn in range(1 if task["row"] == "statistics" else task["repeats"]):
        for side, runs in sides.items():
            if side == "ours":
                runs.append(measured(task, side))
                continue
            same = task | {"row": next((name for name in SAME_NAIVE if task["row"].startswith(name)), task["row"])}
            key = json.dumps([same, turn])
            known[key] = known.get(key) or measured(same, side)
            runs.append(known[key])
    found = {name: task[name] for name in KEY}
    for side, runs in sides.items():
        prefix = "" if side == "ours" else "naive_"
        for name in ("seconds", "passes", "head_passes", "bare", "peak_gib"):
            values = [r[name] for r in runs if r[name] is not None]
            found[prefix + name] = f"{statistics.median(values):.4g}" if values else ""
    seconds = float(found["seconds"])
    found["tokens_per_second"] = f"{task['tokens'] * task['steps'] / seconds:.0f}"
    if "naive" in sides:
        found["ratio"] = f"{float(found['naive_seconds']) / seconds:.2f}"
        pairs = list(zip(sides["ours"][0]["choices"], sides["naive"][0]["choices"], strict=True))
        found["same"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}" if pairs else ""
    return found


def tasks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured, in order."""
    names = ("dtype", "naive_dtype", "calibration", "seqlen", "steps", "threads", "monitor", "repeats")
    common = {name: getattr(arguments, name) for name in names}
    found = []
    for name in arguments.rows:
        if name == "growth":
            for entry in arguments.growth:
                size, _, tokens = entry.partition("@")
                if not tokens.isdecimal():
                    raise measure.BadBenchmark(f"growth {entry!r}: expected LAYERSxHIDDEN@TOKENS, such as {GROWTH[0]}")
                found.append(common | {"row": name, "model": f"random:{size}", "tokens": int(tokens)})
        else:
            found += [common | {"row": name, "model": model, "tokens": arguments.tokens} for model in arguments.model]
    for task in found:
        if task["model"].startswith("random:"):
            task["calibration"] = "random tokens"
        if task["row"] == "statistics":
            task["steps"] = 1  # one pass
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if arguments.one:
        print(json.dumps(one(json.loads(arguments.one)).to_dict()))
        return
    unknown = [name for name in arguments.rows if name not in ROWS]
    if unknown:
        raise SystemExit(f"row {unknown[0]!r} is not known; known: {', '.join(ROWS)}")
    out: Path = arguments.out
    rows = list(csv.DictReader(out.read_text().splitlines())) if out.is_file() else []
    known: dict[str, dict[str, Any]] = {}
    try:
        for task in tasks(arguments):
            if any(all(r[name] == str(task[name]) for name in KEY) for r in rows):
                continue
            rows.append(row(task, known))
            write_csv(out, COLUMNS, rows)
            print({k: v for k, v in rows[-1].items() if v != ""}, flush=True)
    except measure.BadBenchmark as error:
        raise SystemExit(str(error)) from None
    print(markdown(COLUMNS, [[r.get(name, "") for name in COLUMNS] for r in rows]))


if __name__ == "__main__":
    main()
