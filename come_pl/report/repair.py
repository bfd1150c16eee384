"""What a repair in closed form did, in sentences, from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = {
    "down": "the MLP's output projection was",
    "both": "the output projections of attention and MLP were",
    "all": "the output projections of attention and MLP, and the projections that read the layer's input, were",
}


def repair_words(refit: Mapping[str, Any] | None, whole: bool = True) -> str:
    """What was repaired; empty without a repair.

    Args:
        refit: the settings, as in `run.json`.
        whole: False for a model of a depth on the way, without what comes at the target depth.
    """
    refit = refit or {}
    parts = PARTS.get(str(refit.get("parts")))
    if parts is None:
        return ""
    each = refit.get("when") == "step"
    at_the_end = bool(refit.get("sweep")) or not each
    if not whole and not each:
        return "Not repaired: the run does that at its target depth only."
    where = ["after each step in the layer that changed"] if each else []
    if at_the_end and whole:
        where.append("at the target depth in every layer from the lowest changed one up")
    said = [
        f"Repaired in closed form, on the calibration text: {' and '.join(where)}, {parts} solved for so that a layer "
        "gives what the dense model gave there."
    ]
    if refit.get("parts") == "all" and refit.get("channels") == "group":
        said.append(
            "A layer that stands for several has the MLP channels of all of them that matter most, unless its own did "
            "clearly better."
        )
    if refit.get("final") and whole:
        last = refit.get("last")
        said.append(
            "Last, the gains of the final norm were fitted to what the dense model predicts and to the text"
            + (
                f", and the output projections of the last layers ({last} at most) were solved for, for the same"
                * bool(last)
            )
            + "."
        )
    if not whole and (at_the_end or refit.get("final")):
        said.append("What the run repairs at its target depth is not in this model.")
    return " ".join(said)
