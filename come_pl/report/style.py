"""What all pictures and the page share: colours that colour-blind people can tell apart, titles, numbers."""

from __future__ import annotations

import math
import os
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from come_pl.models import EMBEDDED, PRETTY_NAMES

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, SOFT, GREY, PALE = "#222222", "#5f5f5f", "#cfcfcf", "#ededed"
TITLE: dict[str, Any] = {"size": 13, "weight": "bold", "color": INK, "va": "top", "linespacing": 1.3}


def save_picture(figure: Figure, path: Path, title: str, description: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    words = {"Title": title.replace("\u00a0", " "), "Description": description.replace("\u00a0", " ")}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(draft, format="png", dpi=150, facecolor="white", metadata=words)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def wrap(text: str, width: float) -> list[str]:
    """Lines no longer than width, and about as long as each other."""
    count = max(len(textwrap.wrap(text, int(width))), 1)
    evenly = min(int(width), int(1.12 * len(text) / count) + 6)
    return textwrap.wrap(text, evenly, break_on_hyphens=False, break_long_words=False)


def plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def number(value: float | None, digits: int = 2) -> str:
    """Two digits below a hundred, none from a thousand on; a dash where there is no number."""
    if value is None or math.isnan(value):
        return "–"
    if value >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.{digits if value < 100 else 1 if value < 1000 else 0}f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def amount(parameters: int) -> str:
    """A number of parameters: 134.5M, 12.3K."""
    return f"{parameters / 1e6:,.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.1f}K"


def model_name(path: str) -> str:
    """A model's name for people: the demo model's own, or else the end of its path."""
    return PRETTY_NAMES.get(EMBEDDED if path == "embedded" else path, Path(path).name).split(" (")[0]
