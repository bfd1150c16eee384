"""The report of a run, and the continuations in it, which need the models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from come_pl import models
from come_pl.errors import first_line
from come_pl.evaluation.samples import NEW_TOKENS, PROMPTS, continuation
from come_pl.report import write_report
from come_pl.report.page import SAMPLES
from come_pl.report.story import Story, read_json, read_story
from come_pl.runs import RUN_FILE, RunError
from come_pl.workflows.tables import write_json


def report(
    runs: list[Path],
    output: Path | None = None,
    samples: bool = False,
    prompts: list[str] | None = None,
    new_tokens: int = NEW_TOKENS,
    dtype: str = "auto",
) -> Path:
    """Write `report.html`, and its pictures beside it.

    Args:
        runs: Run folders of prune.py or train.py, and folders of come-compare. A pruning run is told with the
            training that began from it.
        output: Folder of the page; by default that of the run, or runs/report for several.
        samples: Let the dense, the pruned and the recovered model continue the prompts first; this loads them.
        prompts: What they continue; a few short English ones by default.
        new_tokens: Tokens of each continuation.
        dtype: auto (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16 or float16.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    if new_tokens < 1:
        raise RunError(f"new_tokens {new_tokens}: expected at least 1")
    for name, value, default in (("new_tokens", new_tokens, NEW_TOKENS), ("dtype", dtype, "auto")):
        if value != default and not (samples or prompts):
            raise RunError(f"--{name} {value} is for continuations, which are not asked for; add --samples")
    for folder in runs if samples or prompts else []:
        if (folder / RUN_FILE).is_file():
            _load_and_ask(read_story(folder), prompts or list(PROMPTS), new_tokens, dtype)
    file = write_report(runs, output)
    print(f"written to {file}")
    return file


def _load_and_ask(story: Story, prompts: list[str], new_tokens: int, dtype: str) -> None:
    """Loads one model after another; those whose folder is gone are left out."""
    paths = {"dense": str((story.info.get("model") or {}).get("path"))}
    if story.pruning:
        paths["pruned"] = str(story.pruning[0])
    if story.trainings:
        paths["recovered"] = str(story.folder)
    elif not (story.folder / "model").is_dir():
        raise RunError(f"run folder {str(story.folder)!r} has no model/ to let speak; run without --samples")
    present = {w: p for w, p in paths.items() if w == "dense" or (Path(p) / "model" / "config.json").is_file()}

    def load(path: str) -> Callable[[], Any]:
        return lambda: models.load_model(path, dtype)

    tokenizer = models.load_tokenizer(paths["dense"])
    ask(story.folder, {which: load(path) for which, path in present.items()}, tokenizer, prompts, new_tokens)


def ask(
    folder: Path,
    loaders: Mapping[str, Callable[[], Any]],
    tokenizer: Any,
    prompts: list[str] | None = None,
    new_tokens: int = NEW_TOKENS,
    known: Path | None = None,
) -> None:
    """Write `samples.json`: what each model, loaded when it is its turn, makes of the prompts.

    Args:
        known: a folder whose own samples.json is taken over where it answers the same.
    """
    found: dict[str, Any] = {"prompts": prompts or list(PROMPTS), "new_tokens": new_tokens}
    earlier = read_json(known / SAMPLES) if known else {}
    if all(earlier.get(key) == value for key, value in found.items()):
        found |= {which: earlier[which] for which in ("dense", "pruned") if which in earlier}
    for which, loader in loaders.items():
        if which not in found:
            model = loader()
            bos = models.needs_bos(model.config.get_text_config(decoder=True), tokenizer)
            found[which] = [continuation(model, tokenizer, text, new_tokens, bos) for text in found["prompts"]]
            del model
    write_json(folder / SAMPLES, found)


def finish(folder: Path, speak: Callable[[], None] | None = None) -> None:
    """The report at the end of a run: what fails here is said, and the run stays as it is."""
    for what, do, again in (("samples.json", speak, " --samples"), ("report.html", lambda: write_report([folder]), "")):
        try:
            if do is not None:
                do()
        except Exception as error:
            line = first_line(error)
            print(f"warning: no {what} ({line}); `come-report {folder}{again}` tries again", file=sys.stderr)
