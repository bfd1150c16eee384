"""The tables of the page: rows of text, ready to be shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from come_pl.evaluation.zeroshot import mean_score
from come_pl.report.methods import Row, asked, by_text, ground
from come_pl.report.story import STAGES, Story, Tile, method_name, times
from come_pl.report.style import amount, number, percent, plural


@dataclass
class Table:
    """`heads`: how many columns at the left are names, not numbers; `folded`: shown when it is asked for."""

    caption: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    heads: int = 1
    folded: bool = False


def _tables(*found: Table) -> list[Table]:
    return [table for table in found if table.rows]


def merges(story: Story) -> list[Table]:
    """Of each new layer that is not a dense one: what it is made of."""
    rows = []
    kept: dict[int, float] = {}  # what a repair concatenated: dense layer → share of its MLP channels
    for step in story.steps:
        shares = (step.get("scores") or {}).get("channels_kept") or []
        kept |= {layer: share for layer, share in enumerate(shares) if share is not None}
    for index, layer in enumerate(story.shares):
        real = {t: s for t, s in layer.items() if s > 0}
        gone = [str(t) for t, s in layer.items() if s == 0]
        if len(real) > 1 or gone:
            made, channels = (
                ", ".join(f"{t} ({s:.0%})" for t, s in shares.items())
                for shares in (real, {t: kept[t] for t in layer if t in kept})
            )
            rows.append([str(index), made, ", ".join(gone) or "–", *([channels or "–"] if kept else [])])
    note = "In brackets: the share of attention heads and feed-forward channels that each dense layer gave."
    columns = ["new layer", "made of dense layers", "stands in for dropped"]
    if kept:
        note += " A repair chose the feed-forward channels anew, from all layers that a layer stands for."
        columns.append("its feed-forward channels come from")
    return _tables(Table("Layers that stand for several", columns, rows, note, heads=len(columns), folded=True))


def steps(story: Story) -> list[Table]:
    columns = ["step", "what", "layers then", "ratio", "loss", "KL", "seconds", "peak GiB"]
    rows = []
    for step in story.steps:
        ratio = " : ".join(f"{r:.2f}" for r in step.get("ratio") or []) or "–"
        layers = "+".join(map(str, step["layers"]))
        costs = [number(step.get(key), 3) for key in ("loss", "kl")]
        costs += [number(step.get("seconds"), 1), number(step.get("peak_gib"))]
        rows.append([str(step.get("step", "")), str(step.get("kind", "")), layers, ratio, *costs])
    note = "Layers are numbered as they were before the step."
    if any(step.get("loss") is None for step in story.steps):
        note += " Where there is no loss, none was measured: on the way to a repair at the end."
    return _tables(Table("Every step", columns, rows, note, heads=3, folded=True))


def trainings(story: Story) -> list[Table]:
    """A column for each training."""
    columns: list[dict[str, str]] = []
    for _, info in story.trainings:
        trained, whole, seconds = info.get("trained_parameters"), info.get("parameters"), info.get("seconds")
        share = "–"
        if isinstance(trained, int) and isinstance(whole, int):
            share = f"{amount(trained)} of {amount(whole)}"
        columns.append(
            {
                "method": method_name(info),
                "tokens": f"{info.get('tokens_seen', 0):,}",
                "text": Path(str((info.get("data") or {}).get("source", "–"))).name,
                "parameters trained": share,
                "seconds": number(seconds, 0) if isinstance(seconds, int | float) else "–",
                "tokens/s": number(info.get("tokens_per_second"), 0),
                "peak GiB": number(info.get("peak_gib")),
            }
        )
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]] if columns else []
    return _tables(Table("What training took", [""] * (len(columns) + 1), rows))


def quality(story: Story) -> list[Table]:
    """Perplexity of the run, and what come-eval measured."""
    stages = [s for s in STAGES if any(s in row for row in story.perplexity.values())]
    rows = [
        [Path(text).name, f"{row.get('tokens', 0):,.0f}"]
        + [number(row.get(stage)) for stage in stages]
        + [f"{number(times(row, s))}×" if {s, "dense"} <= row.keys() else "–" for s in stages[1:]]
        for text, row in story.perplexity.items()
    ]
    columns = ["held-out text", "tokens", *stages, *(f"{stage} / dense" for stage in stages[1:])]
    note = "Lower is better; 1× is the dense model."
    results = story.results("eval")
    return _tables(Table("Perplexity", columns, rows, note), *_evaluated(results), _tasks(results))


def _evaluated(results: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    rows = []
    for stage, result in results.items():
        for text, entry in result.get("perplexity", {}).items():
            for which in ("dense", "model") if stage == "pruned" or len(results) == 1 else ("model",):
                if which in entry:
                    one, name = entry[which], "dense" if which == "dense" else stage
                    values = [number(one["token"]), number(one["word"]), number(one.get("kl"), 3)]
                    kept = entry.get("quality_kept") if which == "model" else 1.0
                    rows.append([Path(text).name, name, f"{one['tokens']:,}", *values, percent(kept)])
    columns = ["held-out text", "model", "tokens", "perplexity a token", "a word", "KL to dense", "quality kept"]
    note = "Measured by come-eval. Quality kept: dense perplexity / perplexity. KL in nats a token."
    return _tables(Table("Perplexity by token and by word", columns, rows, note, heads=2))


def _tasks(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each task as it was asked: other examples or another number of questions are a row of their own."""
    asked: dict[tuple[str, str, str], dict[str, Any]] = {}
    for stage, result in results.items():
        for name, task in result.get("tasks", {}).items():
            questions = (task.get("model") or {}).get("samples", "")
            row = asked.setdefault((name, str(task.get("shots", "")), str(questions)), {})
            row |= {s: task[w] for s, w in ((stage, "model"), ("dense", "dense")) if w in task}
    names = list(dict.fromkeys(name for name, _, _ in asked))
    found = dict(sorted(asked.items(), key=lambda item: names.index(item[0][0])))
    stages = [stage for stage in STAGES if any(stage in row for row in found.values())]
    common = [row for row in found.values() if row.keys() >= set(stages)]
    if common:
        found["average", "", ""] = {stage: mean_score([row[stage] for row in common]) for stage in stages}
    kept = [stage for stage in stages[1:] if "dense" in stages]
    rows = [
        [*how, *(_score(row.get(stage)) for stage in stages), *(percent(_kept(row, stage)) for stage in kept)]
        for how, row in found.items()
    ]
    columns = ["task", "examples", "questions", *(f"{s}, %" for s in stages), *(f"{s}: kept" for s in kept)]
    note = "Accuracy, normalised where the task has it, ± one standard error; lm-eval."
    if 0 < len(common) < len(asked):
        note += " The average is of the rows without a gap."
    return Table("Tasks", columns, rows, note)


def _kept(row: Mapping[str, Mapping[str, Any]], stage: str) -> float | None:
    """Share of the dense model's score."""
    dense = row["dense"]["score"] if "dense" in row else 0
    return row[stage]["score"] / dense if dense and stage in row else None


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    error = "" if score.get("stderr") is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['score']:.1f}{error}"


def latency(info: Mapping[str, Any]) -> list[Table]:
    rows = []
    for result in info["results"]:
        for which, name in (("dense", "dense"), ("model", "pruned")):
            if which in result:
                one = result[which]
                speeds = [one[f"{part}_tokens_per_second"] for part in ("prompt", "generation")]
                load = f"batch {result['batch']}, prompt {result['prompt']}, new {result['new_tokens']}"
                rows.append([load, name, *(number(v, 1) for v in speeds), number(one["peak_gib"])])
    machine, settings = info["machine"], info["settings"]
    threads = f", {machine['threads']} threads" if machine.get("threads") else ""
    note = f"{machine['device']}{threads}, {info['model']['dtype']}"
    note += f", {'' if settings['compile'] else 'not '}compiled; medians of {plural(settings['repeats'], 'turn')}."
    columns = ["load", "model", "prompt tokens/s", "new tokens/s", "peak GiB"]
    return _tables(Table("Throughput", columns, rows, note, heads=2))


def provenance(story: Story) -> list[Table]:
    found = []
    for folder, info in story.chain:
        data, model = info.get("data") or {}, info.get("model") or {}
        options = ", ".join(f"{k} = {v}" for k, v in (info.get("method") or {}).items() if k != "name")
        seconds = info.get("seconds")
        refit = info.get("refit") or {}
        spent = seconds if isinstance(seconds, dict) else {"training": seconds} if seconds is not None else {}
        facts = {
            "folder": folder,
            "status": info.get("status"),
            "dense model": model.get("path"),
            "weights, fingerprint": model.get("fingerprint"),
            "number format": ", ".join(filter(None, (model.get("dtype"), model.get("precision")))),
            "method": f"{(info.get('method') or {}).get('name')}" + (f" ({options})" if options else ""),
            "repair": ", ".join(f"{k} = {v}" for k, v in refit.items()) if refit.get("parts") != "none" else "",
            "text": data.get("source"),
            "text, fingerprint": data.get("fingerprint"),
            "tokens": f"{data['tokens']:,}" if isinstance(data.get("tokens"), int) else data.get("tokens"),
            "tokens in a window": data.get("seqlen"),
            "seed": info.get("seed"),
            "devices": info.get("devices"),
            "seconds": ", ".join(f"{name.replace('_', ' ')} {number(v, 1)}" for name, v in spent.items()),
            "peak memory, GiB": info.get("peak_gib"),
            "versions": ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items()),
        }
        what = "Training" if "student" in info else "Pruning"
        found += _facts(f"{what}: {folder.name}", facts)
    return found


def _facts(caption: str, facts: Mapping[str, Any]) -> list[Table]:
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "", [])]
    return _tables(Table(caption, ["", ""], rows, heads=2))


def settings_of(settings: Mapping[str, Any]) -> list[Table]:
    """What every run of a comparison had in common."""
    facts = {name.replace("_", " "): value for name, value in settings.items() if name != "command"}
    for name in ("evaluation", "passed"):
        facts[name] = ", ".join(map(str, facts.get(name) or []))
    return _facts("The same for every run", facts)


def comparison(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Table]:
    columns = ["method", "layers", "× dense", "seconds", "perplexity", "quality kept", "peak GiB"]
    found, tasks = [], asked(rows, settings)
    columns += ["tasks", "tasks kept"] if tasks else []
    for text, chosen in by_text(rows):
        cells = []
        for row in sorted(chosen, key=lambda r: (-r["layers"], r.get("times_dense") or math.inf)):
            values = ["failed", "–", "–", "–", "–"]
            if row["status"] == "finished":
                values = [number(row["times_dense"]), number(row["seconds"], 1), number(row["perplexity"])]
                values += [percent(row["quality_kept"]), number(row["peak_gib"])]
            if tasks:
                values += [percent(row.get("score")), percent(row.get("score_kept"))]
            cells.append([row["method"], str(row["layers"]), *values])
        note = ground(chosen, settings, text) + " Quality kept: dense perplexity / perplexity." + tasks
        found += _tables(Table(f"Every run, on {Path(text).name}", columns, cells, note))
    failed = [[r["method"], str(r["layers"]), str(r["error"])] for r in rows if r.get("error")]
    return found + _tables(Table("What failed", ["method", "layers", "why"], failed, heads=3))


def comparison_tiles(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Tile]:
    """Of the least depth: the best method, and the fastest."""
    done = [row for row in rows if row["status"] == "finished" and row["text"] == rows[0]["text"]]
    if not done:
        return []
    depth = min(row["layers"] for row in done)
    there = [row for row in done if row["layers"] == depth]
    best = min(there, key=lambda row: row["times_dense"] or math.inf)
    fastest = min(there, key=lambda row: row["seconds"])

    def tile(heading: str, row: Row, tone: str) -> Tile:
        words = f"{number(row['times_dense'])}× dense perplexity at {depth} of {settings['layers']} layers"
        return Tile(heading, row["method"], f"{words}, in {number(row['seconds'], 1)} s", tone)

    return [tile("Loses least", best, "won"), tile("Fastest", fastest, "")]
