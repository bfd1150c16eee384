"""What a run folder holds, and what that says: what was removed, what it cost, what was won back.

A story is that of a pruning run and of the distillations that began from it. Only JSON, JSON lines and CSV are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from come_pl.report.layers import Step, load_record, shares
from come_pl.report.style import model_name, number, plural
from come_pl.runs import RUN_FILE, RunError, read_run

COMPARISON = "comparison.json"
STAGES = ("dense", "pruned", "recovered")
METHOD_NAMES = {"come": "CoMe", "come_p": "CoMe-P", "mp": "CoMe-mp", "sp": "CoMe-sp", "hybrid": "CoMe-hybrid"}
TRAININGS = {"kd": "logit distillation", "lora": "LoRA", "lm": "next-token training"}


def read_json(file: Path) -> dict[str, Any]:
    """An optional result of a run; empty if it is not there. Raises RunError: damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{str(file)!r} is damaged (expected JSON); remove it, or write it again") from None
    return content if isinstance(content, dict) else {}


@dataclass
class Story:
    """A run folder and those that it came from.

    Attributes:
        folder: the one that was given.
        chain: (folder, run.json) from the pruning run to the one that was given; the first may be missing.
        record: folder whose `record.jsonl` says what was pruned.
        dense: layers of the dense model.
    """

    folder: Path
    chain: list[tuple[Path, dict[str, Any]]]
    record: Path
    steps: list[Step] = field(default_factory=list)
    dense: int = 0

    @property
    def info(self) -> dict[str, Any]:
        return self.chain[-1][1]

    @property
    def pruning(self) -> tuple[Path, dict[str, Any]] | None:
        return None if "student" in self.chain[0][1] else self.chain[0]

    @property
    def trainings(self) -> list[tuple[Path, dict[str, Any]]]:
        return self.chain[0 if self.pruning is None else 1 :]

    @property
    def finished(self) -> bool:
        return self.info.get("status") == "finished"

    @property
    def layers(self) -> int:
        """Layers that are left, as far as the run has come."""
        groups = self.info.get("groups") or (self.info.get("student") or {}).get("groups")
        groups = groups or (self.steps[-1].get("groups") if self.steps else None)
        return len(groups) if groups else self.dense

    @property
    def name(self) -> str:
        return model_name(str((self.info.get("model") or {}).get("path") or self.folder.name))

    @property
    def shares(self) -> list[dict[int, float]]:
        """Per layer: dense layer -> its share, as `layers.shares`."""
        return shares(self.steps, self.dense)

    @property
    def perplexity(self) -> dict[str, dict[str, float]]:
        """By text: tokens and perplexity of the stages that were measured; "recovered" is the model of the folder."""
        found: dict[str, dict[str, float]] = {}
        names = {"before": "pruned", "after": "recovered"}
        first, last = len(self.chain) - len(self.trainings), len(self.chain) - 1
        for index, (_, info) in enumerate(self.chain):
            for text, entry in (info.get("perplexity") or {}).items():
                row = found.setdefault(text, {})
                told = row.keys() & entry.keys() & {"tokens", "seqlen", "fingerprint"}
                if any(row[key] != entry[key] for key in told):
                    row.clear()  # measured anew on other tokens: only what can be compared stays
                for key, value in entry.items():
                    if key == "before" and (index > first or "pruned" in row) or key == "after" and index < last:
                        continue  # of a model between two trainings, or known
                    row[names.get(key, key)] = value
        return found

    @property
    def parameters(self) -> tuple[int, int] | None:
        """Of the dense model and of what is left."""
        counts = self.pruning[1].get("parameters") if self.pruning else None
        return (counts["dense"], counts["pruned"]) if isinstance(counts, dict) else None

    def results(self, name: str) -> dict[str, dict[str, Any]]:
        """`NAME.json` of the pruned and of the recovered model, where they were measured."""
        folders = {"pruned": self.pruning[0] if self.pruning else None}
        if self.trainings:
            folders["recovered"] = self.folder
        read = {stage: read_json(folder / f"{name}.json") for stage, folder in folders.items() if folder}
        return {stage: content for stage, content in read.items() if content}


def read_story(folder: Path) -> Story:
    """Raises RunError: no run there, or a damaged one."""
    chain = [(folder, read_run(folder))]
    while parent := (chain[0][1].get("student") or {}).get("run"):
        found = _found(Path(parent), chain[0][0])
        if found is None or any(found.resolve() == known.resolve() for known, _ in chain):
            break
        chain.insert(0, (found, read_run(found)))
    record = next((known for known, _ in chain if (known / "record.jsonl").is_file()), chain[0][0])
    try:
        steps, _, dense = load_record(record)
    except ValueError:
        raise RunError(f"{str(record / 'record.jsonl')!r} is damaged (expected a JSON object in each line)") from None
    return Story(folder, chain, record, steps, dense)


def _found(parent: Path, child: Path) -> Path | None:
    """A run as it was named from the folder that the command ran in, or moved together with the run it began."""
    beside = (child.parent / parent.name, child.parent.parent / "prune" / parent.name)
    return next((p for p in (parent, *beside) if (p / RUN_FILE).is_file()), None)


def method_name(info: dict[str, Any]) -> str:
    name = str((info.get("method") or {}).get("name") or "an unnamed method")
    return METHOD_NAMES.get(name, TRAININGS.get(name, name))


def main_text(story: Story) -> tuple[str, dict[str, float]]:
    """The text that the summary speaks of: the first that was measured at most stages, of those of the last run if it
    has any."""
    known = story.perplexity
    found = {text: known[text] for text in story.info.get("perplexity") or known}
    text = max(found, key=lambda text: len(found[text].keys() & set(STAGES)), default="")
    return Path(text).name, found.get(text, {})


def times(row: dict[str, float], stage: str) -> float:
    return row[stage] / row["dense"]


def won_back(row: dict[str, float]) -> float | None:
    """Share of the loss that pruning added (nats per token) which training took away again."""
    if not all(0 < row.get(stage, 0) < math.inf for stage in STAGES) or row["pruned"] <= row["dense"]:
        return None
    return math.log(row["pruned"] / row["recovered"]) / math.log(row["pruned"] / row["dense"])


def removal(story: Story) -> str:
    """How layers went: "merging neighbours (CoMe)"."""
    kinds = {("drop" if step.get("kind") == "drop" else "merge") for step in story.steps}
    verbs = {"drop": "dropping them", "merge": "merging neighbours"}
    how = " and ".join(verbs[kind] for kind in sorted(kinds, reverse=True)) or "pruning"
    return f"{how} ({method_name(story.pruning[1])})" if story.pruning else how


def summary(story: Story) -> str:
    """One sentence: what was removed, what it cost, what was won back."""
    gone = story.dense - story.layers
    words = f"{gone} of {plural(story.dense, 'layer')} {'was' if gone == 1 else 'were'} removed by {removal(story)}"
    if not story.finished:
        words = f"This run is not finished: so far {words}"
    _, row = main_text(story)
    if "dense" in row and "pruned" in row:
        words += f", which took perplexity from {number(row['dense'])} to {number(row['pruned'])} "
        words += f"({number(times(row, 'pruned'))}×)"
    if "dense" in row and "recovered" in row:
        now = f"{number(row['recovered'])} ({number(times(row, 'recovered'))}×)"
        words += f"; {_training(story)} brought {'it' if 'pruned' in row else 'perplexity'} to {now}"
    return words + "."


def _training(story: Story) -> str:
    tokens = sum(int(info.get("tokens_seen") or 0) for _, info in story.trainings)
    names = " and ".join(dict.fromkeys(method_name(info) for _, info in story.trainings))
    return f"training on {tokens:,} tokens ({names})" if tokens else f"training ({names})"


@dataclass
class Tile:
    """A big number: its heading, itself, and a line that explains it."""

    heading: str
    value: str
    words: str
    tone: str = ""


def tiles(story: Story) -> list[Tile]:
    """The big numbers of a run."""
    text, row = main_text(story)
    counts = story.parameters
    size = ""
    if counts:
        size = f", {counts[0] / 1e6:,.1f}M → {counts[1] / 1e6:,.1f}M parameters (−{1 - counts[1] / counts[0]:.0%})"
    gone = story.dense - story.layers
    found = [Tile("Removed", f"{gone} of {story.dense} layers", f"{story.dense} → {story.layers} layers{size}", "cut")]
    if "dense" in row and "pruned" in row:
        words = f"perplexity {number(row['dense'])} → {number(row['pruned'])} on {text}, before any training"
        found.append(Tile("What it cost", f"{number(times(row, 'pruned'))}× perplexity", words, "cost"))
    if "dense" in row and "recovered" in row:
        back = won_back(row)
        words = (f"{number(row['pruned'])} → {number(row['recovered'])} " if "pruned" in row else "") + "by training"
        words += f", now {number(times(row, 'recovered'))}× dense"
        value = f"{back:.0%} of the damage" if back is not None else f"perplexity {number(row['recovered'])}"
        words += "; damage: the nats a token that pruning added" if back is not None else ""
        heading, tone = "Won back", "won"
        if back is not None and back < 0:  # a training that made it worse
            heading, tone, value = "Lost by training", "cost", f"{-back:.0%} more"
        found.append(Tile(heading, value, f"perplexity {words}", tone))
    found += _speed(story) or _smaller(story)
    for stage, result in story.results("eval").items():
        kept = (result.get("average") or {}).get("kept")
        if kept is not None and stage == ("recovered" if story.trainings else "pruned"):
            words = f"of the dense model's mean score in {plural(result['average']['tasks'], 'task')}"
            found.append(Tile("Tasks", f"{kept:.0%} kept", words))
    return found


def _speed(story: Story) -> list[Tile]:
    results = list(story.results("latency").values())
    gains = [r["speed_up"] for r in (results[-1].get("results") if results else None) or [] if "speed_up" in r]
    if not gains:
        return []
    middle = {part: sorted(g[part]["median"] for g in gains)[len(gains) // 2] for part in ("generation", "prompt")}
    words = f"when it writes, {middle['prompt']:.2f}× when it reads; measured"
    return [Tile("Gained", f"{middle['generation']:.2f}× as fast", words, "won")]


def _smaller(story: Story) -> list[Tile]:
    counts = story.parameters
    if not counts or not story.layers:
        return []
    ideal = story.dense / story.layers
    words = f"and up to {ideal:.2f}× as fast (dense layers / layers left); come-latency measures it"
    return [Tile("Gained", f"{1 - counts[1] / counts[0]:.0%} smaller", words, "won")]


def bars(story: Story) -> list[tuple[str, float, str]]:
    """Stage, share of the dense model's quality (dense perplexity / its perplexity) and the perplexity."""
    _, row = main_text(story)
    if "dense" not in row:
        return []
    return [(stage, min(1.0, 1 / times(row, stage)), number(row[stage])) for stage in STAGES if row.get(stage, 0) > 0]


def strip(story: Story) -> list[tuple[str, str, str]]:
    """Kind (kept, merged, dropped), dense layers and words for each cell of the row of layers."""
    cells: list[tuple[str, str, str]] = []
    for index, layer in enumerate(story.shares):
        real = {teacher: share for teacher, share in layer.items() if share > 0}
        words = f"layer {index}: dense " + " + ".join(
            str(t) if len(real) == 1 else f"{t} ({s:.0%})" for t, s in real.items()
        )
        own = ("merged" if len(real) > 1 else "kept", "+".join(map(str, real)), words)
        dropped = [(min(real) > t, ("dropped", str(t), f"dense {t}: dropped")) for t, s in layer.items() if s == 0]
        cells += [cell for first, cell in dropped if first] + [own] + [cell for first, cell in dropped if not first]
    return cells


def newest(stories: Sequence[Story]) -> list[Story]:
    """Without those that another story tells already."""
    told = {folder.resolve() for story in stories for folder, _ in story.chain[:-1]}
    return [story for story in stories if story.folder.resolve() not in told]
