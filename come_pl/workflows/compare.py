"""Many pruning runs on one model with the same tokens: methods × depths, each run a process of its own."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from come_pl import models
from come_pl.errors import did_you_mean
from come_pl.pruning.methods import METHODS, find
from come_pl.report.style import number
from come_pl.runs import RUN_FILE, RunError, digest, read_run, target_depth
from come_pl.workflows.comparison import write_tables
from come_pl.workflows.report import finish
from come_pl.workflows.scores import Scoring
from come_pl.workflows.tables import write_json

ROOT = Path("runs/compare")
# options that are of the run, not of its method
OF_RUNS = {
    "refit": "--refit.parts",
    "refit_when": "--refit.when",
    "sweep": "--refit.sweep",
    "weighting": "--refit.weighting",
    "ahead": "--refit.ahead",
    "channels": "--refit.channels",
    "final": "--refit.final",
    "last": "--refit.last",
    "tokens": "--data.tokens",
}
DEPTHS = (0.9, 0.8, 0.7)  # of the model's layers, where no depths are given


class BadMethod(ValueError):
    """A method that cannot be read; the message says how one is written."""


@dataclass(frozen=True)
class Contender:
    """A method with its options, as it is named in the table."""

    name: str
    options: tuple[tuple[str, str], ...] = ()
    label: str = ""

    @property
    def arguments(self) -> list[str]:
        own = [f"{OF_RUNS.get(key, f'--method.{key}')}={value}" for key, value in self.options]
        return [f"--method.name={self.name}", *own]


def read_contender(text: str) -> Contender:
    """`NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`; `label=…` among the options is its name in the table.

    A comma that is not followed by `OPTION=` belongs to the value: `reverse:layers=[1,2],label=first`.

    Raises:
        BadMethod: not written like that, or an option that the method does not have. UnknownMethod: no method of that
            name.
    """
    name, colon, rest = text.partition(":")
    known = [*inspect.signature(find(name)[1]).parameters, *OF_RUNS, "label"]
    options: dict[str, str] = {}
    for part in re.split(r",(?=\s*[\w-]+=)", rest) if colon else []:
        key, equals, value = part.strip().partition("=")
        key = key.replace("-", "_")
        if not equals or not value or not re.fullmatch(r"[A-Za-z_]\w*", key) or key == "name" or key in options:
            raise BadMethod(
                f"method {text!r}: {part.strip()!r} is not an option; expected NAME:OPTION=VALUE,OPTION=VALUE"
                + (" with each option once" if key in options else "")
            )
        if key not in known:
            hint = did_you_mean(key, known)
            raise BadMethod(f"method {text!r} has no option {key!r}; its options: {', '.join(known)}{hint}")
        options[key] = value
    label = options.pop("label", name + (f" {', '.join(f'{k}={v}' for k, v in options.items())}" if options else ""))
    return Contender(name, tuple(options.items()), label)


def read_contenders(texts: Sequence[str]) -> list[Contender]:
    """Raises BadMethod: none, two of one label, or one method twice with the same options."""
    found = [read_contender(text) for text in texts]
    if not found:
        raise BadMethod("no method to compare; expected --methods NAME NAME …")
    for index, one in enumerate(found):
        for other in found[:index]:
            if one.label == other.label:
                raise BadMethod(f"method {texts[index]!r}: {one.label!r} is in the list already; give it a label=…")
            if (one.name, set(one.options)) == (other.name, set(other.options)):
                raise BadMethod(f"method {texts[index]!r} is the same as {other.label!r}; name it once")
    return found


def compare(
    methods: list[str] | None = None,
    depths: list[int] | None = None,
    model: str = "embedded",
    calibration: str = "embedded",
    tokens: int = 16384,
    seqlen: int = 512,
    evaluation: list[str] | None = None,
    evaluation_tokens: int = 16384,
    tasks: list[str] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    output: Path = ROOT,
    keep_models: bool = False,
    overwrite: bool = False,
    passed: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run every method at every depth, and write the table and the plots.

    A run that is finished is not run again, one that was cut off goes on; one that fails is reported and the others
    run. So the same command goes on after a kill, and another one with more methods adds to the table. A method whose
    steps do not depend on where it is to stop runs once, to the least depth, and is measured on its way there. The
    dense model is measured by the first run alone.

    Args:
        methods: Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE (`come:rho=0.5,label=half`); all by default.
        depths: Depths to prune to; 0.9, 0.8 and 0.7 of the model's layers by default.
        model: The dense model: `embedded`, a folder, a .gguf file or a hub id.
        calibration: Text source that every method measures the model on.
        tokens: Calibration tokens, the same for every method but those with `tokens=…` among their options.
        seqlen: Tokens in a window.
        evaluation: Held-out text sources; `embedded` by default.
        evaluation_tokens: Tokens of each.
        tasks: Tasks or groups of lm-eval that every model and the dense one are asked, NAME or NAME=SHOTS; none by
            default.
        include_path: Folder with lm-eval task files of one's own.
        limit: Questions of each task (each subject of MMLU); all by default.
        seed: Seed of everything random.
        output: Folder of the table, the plots, `runs/` (a run folder each) and `logs/` (what each run printed).
        keep_models: Keep the pruned models, of a run through several depths the last. By default the model/ of a run is
            removed once it is measured, to save disk; its run.json, record and pictures stay.
        overwrite: Run what is finished again.
        passed: Further arguments of prune.py, for every run.

    Returns:
        One row for each method, depth and evaluation text.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    contenders = read_contenders(list(METHODS) if methods is None else methods)
    layers = models.load_config(model).get_text_config(decoder=True).num_hidden_layers
    targets = [round(share * layers) for share in DEPTHS] if depths is None else depths
    targets = sorted({target_depth(layers, depth, None) for depth in targets}, reverse=True)
    if not targets:
        raise RunError("no depth to prune to; expected --depths N N …")
    texts = evaluation or ["embedded"]
    common = {
        "--model.path": model,
        "--data.calibration": calibration,
        "--data.tokens": tokens,
        "--data.seqlen": seqlen,
        "--evaluation.data": json.dumps(texts, ensure_ascii=False),
        "--evaluation.tokens": evaluation_tokens,
        "--seed": seed,
    }
    shared = [*(f"{name}={value}" for name, value in common.items()), *passed]
    if limit is not None and limit < 1:
        raise RunError(f"limit {limit}: expected at least 1")
    asked = list(dict.fromkeys(tasks or ()))
    scoring = Scoring(asked, include_path, limit, model, output / "cache", _start) if asked else None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"output folder {str(output)!r} cannot be written ({error.strerror}); give another --output"
        ) from None
    settings = {
        "model": model,
        "layers": layers,
        "calibration": calibration,
        "tokens": tokens,
        "seqlen": seqlen,
        "evaluation": texts,
        "tasks": asked,
        "limit": limit,
        "seed": seed,
        "passed": list(passed),
        "command": " ".join(["come-compare", *sys.argv[1:]]),
    }
    order = {contender.label: place for place, contender in enumerate(contenders)}
    rows: list[dict[str, Any]] = []
    done: Path | None = None  # a run that knows the dense model's perplexity
    for index, contender in enumerate(contenders):
        deepest: Path | None = None
        folders = []
        for place, depth in enumerate(reversed(targets), 1):
            count = f"[{index * len(targets) + place}/{len(contenders) * len(targets)}]"
            print(f"{count} {contender.label} → {depth} of {layers} layers", end=" … ", flush=True)
            failure, folder = None, deepest
            if folder is None or str(depth) not in read_run(folder).get("depths", {}):
                arguments = [f"--target_layers={depth}", *_without(shared, contender.arguments), *contender.arguments]
                name = f"{contender.name}-{depth}-{digest({'arguments': sorted(arguments)})}"
                folder, log = output / "runs" / name, output / "logs" / f"{name}.log"
                arguments += _of_this_command(targets, depth, scoring, None if done == folder else done)
                anew = overwrite or _lacks(folder, targets, keep_models, scoring)
                folders.append(folder)
                failure = _one(folder, log, arguments, anew=anew)
                if failure is None:
                    done = folder
                    deepest = folder if depth == targets[-1] else deepest
            unscored = None
            if scoring is not None and failure is None:
                unscored = scoring.score(folder, depth, output / "logs" / f"{folder.name}-tasks-{depth}.log")
            found = _rows(contender, depth, folder, texts, failure, scoring, unscored)
            print(_said(found[0]), flush=True)
            rows += found
            rows.sort(key=lambda row: (-row["layers"], order[row["method"]]))
            write_tables(rows, settings, output)
        for folder in folders:
            (_keep_models if keep_models else _remove_models)(folder)
    _same_ground(rows)
    write_tables(rows, settings, output)
    finish(output)
    print((output / "comparison.md").read_text(encoding="utf-8"))
    print(f"written to {output}")
    return rows


def _finished(folder: Path) -> bool:
    try:
        return read_run(folder).get("status") == "finished"
    except RunError:
        return False


def _without(arguments: Sequence[str], others: Sequence[str]) -> list[str]:
    """The arguments, as --NAME=VALUE, without those that the others give."""
    names = {word.partition("=")[0] for word in others}
    return [word for word in arguments if word.partition("=")[0] not in names]


def _of_this_command(targets: Sequence[int], depth: int, scoring: Scoring | None, done: Path | None) -> list[str]:
    """Further arguments of a run, which do not make it another one."""
    found = ["--samples=false"]
    if depth == targets[-1] and len(targets) > 1:
        found += [f"--evaluation.at={list(targets[:-1])}", *(["--continue_saving=true"] if scoring else [])]
    return found + ([f"--evaluation.dense_from={done}"] if done else [])


def _lacks(folder: Path, targets: Sequence[int], keep: bool, scoring: Scoring | None) -> bool:
    """Whether a run is finished and does not have what is asked for."""
    if not _finished(folder):
        return False
    info = read_run(folder)
    depths = {info["target_layers"], *map(int, info.get("depths", {}))} & set(targets)
    return (keep and not (folder / "model").is_dir()) or (scoring is not None and scoring.missing(folder, depths))


def _one(folder: Path, log: Path, arguments: Sequence[str], *, anew: bool) -> str | None:
    """One run of prune.py, unless it is finished and not to be run anew; its last error line if it fails."""
    if _finished(folder) and not anew:
        return None
    error = _start([*arguments, f"--output={folder}", *(["--overwrite=true"] if anew else [])], log)
    return error or (None if _finished(folder) else "stopped before its target")


KEPT = "models_kept"  # in run.json: by an earlier command, which asked for them


def _keep_models(folder: Path) -> None:
    if _finished(folder) and not (info := read_run(folder)).get(KEPT):
        write_json(folder / RUN_FILE, info | {KEPT: True})


def _remove_models(folder: Path) -> None:
    if not _finished(folder) or read_run(folder).get(KEPT):
        return
    saved = [path for path in folder.glob("model*") if path.is_dir()]
    if saved:
        write_json(folder / RUN_FILE, read_run(folder) | {"model_removed": "by come-compare; --keep_models keeps it"})
    for path in saved:
        shutil.rmtree(path)


def _start(arguments: Sequence[str], log: Path, module: str = "come_pl.cli.prune") -> str | None:
    """A process of its own: its memory peak is the method's, and a crash takes nothing else down."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        command = [sys.executable, "-m", module, *arguments]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
    if code == 0:
        return None
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    lines = [line for line in lines if line]
    named = [line for line in lines if line.startswith(("error:", "failed:"))]
    return (named or lines or [f"exit code {code}"])[-1].removeprefix("error: ").removeprefix("failed: ")


def _rows(
    contender: Contender,
    depth: int,
    folder: Path,
    texts: Sequence[str],
    error: str | None,
    scoring: Scoring | None = None,
    unscored: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each text.

    Args:
        error, unscored: why there is no model, or why its tasks have no score.
    """
    head: dict[str, Any] = {
        "method": contender.label,
        "layers": depth,
        "name": contender.name,
        "options": dict(contender.options),
        "run": str(folder),
    }
    if error is not None:
        return [head | {"text": text, "status": "failed", "error": error} for text in texts]
    info = read_run(folder)
    on_the_way = info.get("depths", {}).get(str(depth))
    found = on_the_way or {**info, "seconds": info["seconds"]["prune"]}
    measures = {
        "status": "finished",
        "seconds": found["seconds"],
        "peak_gib": found["peak_gib"],
        "calibration_tokens": info["data"]["tokens"],
        "fingerprints": [info["model"]["fingerprint"], info["data"]["fingerprint"]],
        **(scoring.known(folder, depth) if scoring else {}),
        **({"error": f"tasks: {unscored}"} if unscored else {}),
    }
    return [head | {"text": text} | measures | quality(found["perplexity"][text]) for text in texts]


def quality(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexity, how many times the dense one it is, and the share of dense quality kept: dense / pruned."""
    dense, pruned = entry["dense"], entry["pruned"]
    known = math.isfinite(pruned)
    return {
        "perplexity": pruned if known else None,
        "dense": dense,
        "times_dense": round(pruned / dense, 4) if known else None,
        "quality_kept": round(dense / pruned, 4) if known else 0.0,
        "evaluation_tokens": entry["tokens"],
    }


def _same_ground(rows: list[dict[str, Any]]) -> None:
    """Marks runs of an earlier day whose model or calibration tokens are not those of the others (a file changed)."""
    for place, what in enumerate(("model", "calibration tokens")):
        groups: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            if row["status"] == "finished":  # as many tokens of one text are the same
                groups.setdefault(row["options"].get("tokens") if place else None, []).append(row)
        for group in groups.values():
            marks = [row["fingerprints"][place] for row in group]
            usual = max(marks, key=marks.count)
            for row, mark in zip(group, marks, strict=True):
                if mark != usual:
                    row |= {
                        "status": "failed",
                        "error": f"not the {what} of the other runs; --overwrite runs all again",
                    }


def _said(row: Mapping[str, Any]) -> str:
    if row["status"] != "finished":
        return f"failed: {row['error']}"
    said = f"{number(row['times_dense'])} × dense perplexity, {row['seconds']:.0f} s, {row['peak_gib']:.2f} GiB"
    if "score" in row:
        said += f", tasks {row['score']:.1%} (dense {row['dense_score']:.1%})"
    return said + (f"; {row['error']}" if row.get("error") else "")
