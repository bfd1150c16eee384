"""The texts that perplexity is measured on, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from come_pl.data import TokenWindows, token_windows
from come_pl.evaluation.perplexity import perplexity
from come_pl.offload import move
from come_pl.runs import read_run


@dataclass
class EvaluationText:
    """Text that dense and pruned perplexity are measured on.

    Args:
        data: Text sources, as for calibration; an empty list measures nothing.
        tokens: Tokens of each.
        seqlen: Tokens in a window; by default that of calibration.
        at: Depths on the way that it is measured at too, where a run to that depth would give the same model (not by
            methods that need to know the last depth, nor with repairs that come at the end).
        dense_from: A run folder whose perplexity of the dense model is taken instead of measured again, where model,
            dtype and windows are the same.
    """

    data: list[str] = field(default_factory=lambda: ["embedded"])
    tokens: int = 16384
    seqlen: int | None = None
    at: list[int] = field(default_factory=list)
    dense_from: str | None = None


def evaluation_windows(evaluation: EvaluationText, tokenizer: Any, bos: bool, seqlen: int) -> dict[str, TokenWindows]:
    """The windows of each text, by its name."""
    size = evaluation.seqlen or seqlen
    budget: dict[str, Any] = {"tokens": evaluation.tokens, "seqlen": size, "bos": bos}
    return {text: token_windows(text, tokenizer, split="evaluation", **budget) for text in evaluation.data}


def measure(
    model: Any,
    texts: Mapping[str, TokenWindows],
    which: str,
    so_far: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> dict[str, dict[str, Any]]:
    """What `so_far` has of these windows, with the perplexity of `model` added as `which` for each text without it.

    An entry: {"tokens": predicted tokens, "seqlen": …, "fingerprint": of the windows, which: perplexity, …}.

    Args:
        device: where the model goes first, if there is anything to measure.
    """
    entries = {}
    for name, windows in texts.items():
        entry = (so_far or {}).get(name, {})
        entry = entries[name] = dict(entry) if measured_on(windows, entry) else {}
        if which in entry:
            continue
        if device is not None:
            move(model, device)
        found = perplexity(model, windows.input_ids, windows.mask, title=f"{which} perplexity on {Path(name).name}")
        entry |= {"tokens": found.tokens, "seqlen": windows.input_ids.shape[1], "fingerprint": windows.fingerprint}
        entry[which] = round(found.token, 4)
    return entries


def dense_of(run: str, model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What another run knows of a dense model, as entries of `measure`; nothing of another model or dtype.

    Args:
        model: fingerprint and dtype, as a `run.json` has them.

    Raises:
        RunError: no run there.
    """
    info = read_run(Path(run).expanduser())
    theirs = info.get("model") or {}
    if any(theirs.get(name) != model[name] for name in ("fingerprint", "dtype")):
        return {}
    known = info.get("perplexity") or {}
    return {
        text: {name: value for name, value in entry.items() if name != "pruned"}
        for text, entry in known.items()
        if "fingerprint" in entry
    }


def measured_on(windows: TokenWindows, entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `measure` is of these windows; one of an earlier version has no fingerprint."""
    if "fingerprint" in entry:
        return bool(entry["fingerprint"] == windows.fingerprint)
    seqlen = windows.input_ids.shape[1]
    return (entry.get("tokens"), entry.get("seqlen")) == (len(windows) * (seqlen - 1), seqlen)
