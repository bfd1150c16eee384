"""The tables of a comparison of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from come_pl.record import write_atomically
from come_pl.report.methods import Row, asked, by_text, ground
from come_pl.report.style import model_name, number, percent
from come_pl.workflows.tables import markdown, write_csv, write_json

COLUMNS = [
    *("method", "layers", "text", "status", "perplexity", "dense", "times_dense", "quality_kept", "seconds"),
    *("peak_gib", "calibration_tokens", "evaluation_tokens", "score", "score_stderr", "dense_score", "score_kept"),
    *("error", "run"),
]


def write_tables(rows: Sequence[Row], settings: Mapping[str, Any], folder: Path) -> None:
    """`comparison.csv`, `.json` and `.md`."""
    public = [{k: v for k, v in row.items() if k != "fingerprints"} for row in rows]
    write_csv(folder / "comparison.csv", COLUMNS, public)
    write_json(folder / "comparison.json", {"settings": settings, "rows": public})
    write_atomically(folder / "comparison.md", _markdown(rows, settings))


def _markdown(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    parts = [f"# {model_name(settings['model'])}: methods compared\n"]
    tasks = asked(rows, settings)
    for text, chosen in by_text(rows):
        parts.append(
            f"{ground(chosen, settings, text)} Quality kept is dense perplexity / pruned perplexity.{tasks}\n\n```\n"
            f"{settings['command']}\n```\n"
        )
        columns = ["method", "layers", "perplexity", "× dense", "quality kept", "seconds", "peak GiB", "tokens"]
        columns += ["tasks", "tasks kept"] if tasks else []
        table = []
        for row in sorted(chosen, key=lambda r: (-r["layers"], r.get("times_dense") or math.inf)):
            if row["status"] != "finished":
                table.append(
                    [row["method"], row["layers"], f"failed: {row['error']}", *"–––––", *("––" if tasks else "")]
                )
                continue
            kept = percent(row["quality_kept"])
            measured = [number(row["perplexity"]), number(row["times_dense"]), kept, f"{row['seconds']:.0f}"]
            measured += [f"{row['peak_gib']:.2f}", row["calibration_tokens"]]
            if tasks:
                measured += [percent(row.get(name)) for name in ("score", "score_kept")]
            table.append([row["method"], row["layers"], *measured])
        parts.append(markdown(columns, table))
    return "\n".join(parts)
