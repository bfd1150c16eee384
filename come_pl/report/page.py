"""`report.html`: one page that needs nothing but itself, and its pictures beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from come_pl.record import write_atomically
from come_pl.report import charts, methods, tables
from come_pl.report.layers import importance, merge_map
from come_pl.report.repair import repair_words
from come_pl.report.story import (
    COMPARISON,
    Story,
    Tile,
    bars,
    method_name,
    newest,
    read_json,
    read_story,
    strip,
    summary,
    tiles,
)
from come_pl.report.style import model_name, plural
from come_pl.report.tables import Table
from come_pl.runs import RUN_FILE, RunError

PAGE, SAMPLES = "report.html", "samples.json"


@dataclass
class Picture:
    """A PNG and its own words; `wide` ones scroll sideways on a phone."""

    path: Path
    wide: bool = False

    def __post_init__(self) -> None:
        with Image.open(self.path) as image:
            self.width, self.height = image.size
            self.title, self.alt = str(image.info["Title"]), str(image.info["Description"])

    @property
    def data(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass
class Section:
    """A part of the page: pictures first, then texts side by side, then tables."""

    name: str
    title: str
    lead: str = ""
    pictures: list[Picture] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass
class Chapter:
    """All that is said of one run or comparison."""

    name: str
    title: str
    where: str
    summary: str
    tiles: list[Tile] = field(default_factory=list)
    bars: list[tuple[str, float, str]] = field(default_factory=list)
    strip: list[tuple[str, str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Draw the pictures and write `report.html`; its path.

    Args:
        runs: Run folders of `prune.py` or `train.py`, and folders of `come-compare`. A pruning run whose distillation
            is in the list too is told there.
        output: Folder of the page and its pictures; by default the run's own, or runs/report for several.

    Raises:
        RunError: a folder that holds neither, a damaged file, or a record that contradicts itself.
    """
    if not runs:
        raise RunError("no run given; expected a run folder of prune.py or train.py, or a folder of come-compare")
    folders = list(dict.fromkeys(Path(run).expanduser() for run in runs))
    stories: list[Story] = []
    comparisons: list[Path] = []
    for folder in folders:
        if (folder / RUN_FILE).is_file():
            stories.append(read_story(folder))
        elif (folder / COMPARISON).is_file():
            comparisons.append(folder)
        else:
            state = f"has neither {RUN_FILE} nor {COMPARISON}" if folder.is_dir() else "does not exist"
            raise RunError(
                f"run {str(folder)!r} {state}; expected a run folder of prune.py or train.py, or one of come-compare"
            )
    output = output or (folders[0] if len(folders) == 1 else Path("runs/report"))
    stories = newest(stories)
    chapters = []
    told: list[Story | Path] = [*stories, *comparisons]
    for number, what in enumerate(told, 1):
        folder = what if isinstance(what, Path) else what.folder
        before = "" if len(told) == 1 else f"{number}-{_slug(folder)}-"
        try:
            tell = _comparison_chapter if isinstance(what, Path) else _run_chapter
            chapters.append(tell(what, output, before))  # type: ignore[arg-type]
        except (KeyError, TypeError, IndexError) as error:
            raise RunError(
                f"{str(folder)!r} cannot be reported: its files lack {error}, or hold something else; run it again"
            ) from error
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / PAGE, render(chapters))
    return output / PAGE


def _slug(folder: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name) or "run"


def render(chapters: Sequence[Chapter]) -> str:
    source = resources.files("come_pl.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    one = chapters[0].title if len(chapters) == 1 else f"{len(chapters)} reports"
    return page.from_string(source).render(chapters=chapters, title=one)


def _run_chapter(story: Story, output: Path, before: str) -> Chapter:
    sections = [
        _layers(story, output, before),
        _importance(story, output, before),
        _repair(story, output, before),
        _training(story, output, before),
        _texts(story),
        _speed(story, output, before),
        Section("quality", "Quality in numbers", "", tables=tables.quality(story)),
        _provenance(story),
    ]
    told = [s for s in sections if s and (s.pictures or s.samples or s.tables or s.commands)]
    for section in told:
        section.name = before + section.name
    title = f"{story.name}: {story.dense} → {story.layers} layers"
    where = f"Run folder {story.folder}"
    cells = strip(story) if story.steps else []
    return Chapter(f"run-{before}", title, where, summary(story), tiles(story), bars(story), cells, told)


def _layers(story: Story, output: Path, before: str) -> Section | None:
    if not story.steps:
        return None
    picture = Picture(merge_map(story.record, output / f"{before}merge_map.png"), wide=True)
    return Section("layers", "What became of each layer", "", [picture], tables=tables.merges(story))


def _importance(story: Story, output: Path, before: str) -> Section | None:
    if not story.steps:
        return None
    lead = "What each decision was made from, and what it cost on the calibration windows. "
    lead += "Loss and KL divergence from the dense model are in nats a token."
    picture = Picture(importance(story.record, output / f"{before}importance.png"), wide=True)
    return Section("steps", "Why these layers, and what each step cost", lead, [picture], tables=tables.steps(story))


def _repair(story: Story, output: Path, before: str) -> Section | None:
    drawn = charts.refits(story.record, output / f"{before}refit.png")
    lead = repair_words(story.pruning[1].get("refit")) if story.pruning else ""
    return Section("repair", "Repair without training", lead, [Picture(drawn)]) if drawn else None


def _training(story: Story, output: Path, before: str) -> Section | None:
    pictures = []
    for number, (folder, _) in enumerate(story.trainings, 1):
        name = f"{before}distill.png" if number == 1 else f"{before}distill-{number}.png"
        drawn = charts.distillation(folder, output / name)
        pictures += [Picture(drawn)] if drawn else []
    names = ", then ".join(method_name(info) for _, info in story.trainings)
    return Section("training", f"Training it back: {names}", "", pictures, tables=tables.trainings(story))


def _texts(story: Story) -> Section | None:
    results = story.results("samples")
    found: dict[str, Any] = results.get("recovered") or results.get("pruned") or {}
    stages = [stage for stage in ("dense", "pruned", "recovered") if stage in found]
    samples = [
        {"prompt": prompt, "texts": [(stage, found[stage][index]) for stage in stages]}
        for index, prompt in enumerate(found.get("prompts") or [])
    ]
    if not samples:
        return None
    lead = f"The most likely continuation, up to {found.get('new_tokens')} tokens, of the same few words by each model."
    return Section("texts", "In their own words", lead, samples=samples)


def _speed(story: Story, output: Path, before: str) -> Section | None:
    pictures, found = [], []
    for stage, result in story.results("latency").items():
        folder = story.folder if stage == "recovered" else story.chain[0][0]
        drawn = charts.latency(folder / "latency.json", output / f"{before}latency.png")
        pictures, found = ([Picture(drawn)] if drawn else []), tables.latency(result)  # the last: same shape as before
    return Section("speed", "Speed", "", pictures, tables=found) if pictures else None


def _provenance(story: Story) -> Section:
    commands = [str(info["command"]) for _, info in story.chain if info.get("command")]
    for name in ("eval", "latency", "samples"):
        commands += [str(r["command"]) for r in story.results(name).values() if r.get("command")]
    lead = "The commands, in their order, and all that decides the result."
    return Section("provenance", "How it was made", lead, commands=commands, tables=tables.provenance(story))


def _comparison_chapter(folder: Path, output: Path, before: str) -> Chapter:
    content = read_json(folder / COMPARISON)
    rows, settings = content["rows"], content["settings"]
    pictures = [Picture(path, wide=True) for path in methods.plots(rows, settings, output, before)]
    done = {row["method"] for row in rows if row["status"] == "finished"}
    depths = sorted({row["layers"] for row in rows}, reverse=True)
    name = model_name(settings["model"])
    title = f"{name}: {plural(len(done), 'method')} compared"
    said = pictures[0].title.partition(": ")[2] if pictures else "no run finished"
    ends = " and ".join(filter(None, [", ".join(map(str, depths[:-1])), str(depths[-1])]))
    words = f"From {settings['layers']} layers to {ends}, with the same tokens: {said}."
    sections = [
        Section(f"{before}methods", "Quality against depth, and against seconds", "", pictures),
        Section(f"{before}quality", "Quality in numbers", "", tables=tables.comparison(rows, settings)),
        _settings(f"{before}provenance", settings),
    ]
    where = f"Folder of come-compare {folder}"
    return Chapter(f"run-{before}", title, where, words, tables.comparison_tiles(rows, settings), sections=sections)


def _settings(name: str, settings: Mapping[str, Any]) -> Section:
    commands = [settings["command"]]
    return Section(name, "How it was made", "", commands=commands, tables=tables.settings_of(settings))
