"""The pruned model that a distillation starts from: read, checked against its teacher, described."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from come_pl import models
from come_pl.record import Record
from come_pl.runs import RunError, followed, read_run

LATEST = Path("runs/prune/latest")


class Misfit(ValueError):
    """A student that was not made from this teacher; the message names both values."""


@dataclass
class Pruned:
    """A run folder of `prune.py`, or of `train.py`, whose `model/` is distilled.

    Attributes:
        groups: for each student layer, the teacher layers that it stands for.
        scales: for each boundary of the teacher, what the student's stream there was multiplied by (compensated
            drops); None where it was not.
        teacher: path of the dense model.
        teacher_layers: depth of the dense model that was pruned.
        dtype: of the stored weights.
        perplexity: what pruning measured, by text.
        adapted: its layers were fitted to its own stream, by a repair or by training.
    """

    folder: Path
    groups: list[list[int]]
    teacher: str
    teacher_layers: int
    dtype: str = "float32"
    perplexity: dict[str, Any] = field(default_factory=dict)
    scales: list[float] | None = None
    adapted: bool = False


def read_pruned(student: str | None) -> Pruned:
    """Raises RunError: no run there, one that is not finished, or one without correspondences."""
    folder = Path(student).expanduser() if student else LATEST
    if student is None and not folder.is_dir():
        raise RunError("no pruned run in runs/prune yet: run `python prune.py` first, or give --student RUN_FOLDER")
    folder = followed(folder)
    info = read_run(folder)
    if not (folder / "model" / "config.json").is_file():
        raise RunError(f"student {str(folder)!r} has no model/ yet: let its run finish first (the same command again)")
    model = info.get("model", {})
    layers = model.get("layers")
    groups = info.get("groups")
    if groups is None and layers and (folder / "record.jsonl").is_file():
        groups = Record.read(folder / "record.jsonl", layers).groups
    if not groups or not layers or "path" not in model:
        raise RunError(f"student {str(folder)!r} does not say which teacher layers its layers stand for (run.json)")
    measured = {}
    for name, entry in info.get("perplexity", {}).items():
        last = entry.get("after", entry.get("pruned"))
        if last is not None:
            measured[name] = entry | {"pruned": last}
    dtype, scales = model.get("dtype", "float32"), info.get("scales")
    adapted = "student" in info or info.get("refit", {}).get("parts", "none") != "none"
    return Pruned(folder, groups, model["path"], layers, dtype, measured, scales, adapted)


def check_fit(pruned: Pruned, teacher: Any, tokenizer: Any, path: str) -> None:
    """Compare a student with the config and tokenizer of its teacher, before any weight is read.

    Raises:
        Misfit: naming what differs, with both values.
    """
    mine = models.load_config(str(pruned.folder / "model")).get_text_config(decoder=True)
    theirs = teacher.get_text_config(decoder=True)
    _same("layers of the dense model", pruned.teacher_layers, theirs.num_hidden_layers, pruned, path)
    _same("layers", mine.num_hidden_layers, len(pruned.groups), pruned, "its own record")
    for name in (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "ffn_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    ):
        _same(name, getattr(mine, name, None), getattr(theirs, name, None), pruned, path)
    if (pruned.folder / "model" / "tokenizer_config.json").is_file():
        own = models.load_tokenizer(str(pruned.folder / "model")).get_vocab()
        other = tokenizer.get_vocab()
        _same("tokens of the tokenizer", len(own), len(other), pruned, path)
        if own != other:
            token = min(t for t in own.keys() | other.keys() if own.get(t) != other.get(t))
            _same(f"the tokenizer's id of {token!r}", own.get(token), other.get(token), pruned, path)


def _same(what: str, mine: Any, theirs: Any, pruned: Pruned, path: str) -> None:
    if mine != theirs:
        raise Misfit(
            f"student {str(pruned.folder)!r} does not fit {path!r}: {what} is {mine} for the student, {theirs} for the "
            "teacher; give the --teacher that it was pruned from"
        )
