"""Model cards: the repair, depths on the way, and where a distilled model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from come_pl.record import Record, Step
from come_pl.runs import Run
from come_pl.workflows.card import distilled_card, pruned_card

REFIT = {"parts": "all", "when": "end", "sweep": 0, "channels": "group", "final": True, "last": 12}
DATA = {"source": "text.txt", "tokens": 2048, "windows": 64, "seqlen": 32}


def info(folder: Path, **over: Any) -> dict[str, Any]:
    (folder / "config.json").write_text("{}")
    model = {"path": str(folder), "layers": 6}
    return {"model": model, "method": {"name": "sleb"}, "data": DATA, "seed": 3, "target_layers": 4} | over


def record(drops: int) -> Record:
    found = Record(6)
    for _ in range(drops):
        found.append(Step(kind="drop", layers=[1]))
    return found


def test_the_repair_is_told(tmp_path: Path) -> None:
    card = pruned_card(info(tmp_path, refit=REFIT), record(2))
    assert "`sleb`: 2 drops." in card and "Repaired in closed form" in card and "(12 at most)" in card
    assert "epaired" not in pruned_card(info(tmp_path, refit={"parts": "none"}), record(2))


def test_a_depth_on_the_way_is_not_repaired(tmp_path: Path) -> None:
    card = pruned_card(info(tmp_path, refit=REFIT), record(1))
    assert "`sleb`: 1 drop." in card and "Not repaired" in card and "Repaired in closed form" not in card


def test_huge_perplexities_are_short(tmp_path: Path) -> None:
    entry = {"tokens": 480, "dense": 92192367058.79, "pruned": 872005664605279.88}
    card = pruned_card(info(tmp_path, perplexity={"held.txt": entry}), record(2))
    assert "| held.txt | 480 | 9.2e+10 | 8.7e+14 | 0.0% |" in card


def test_a_distilled_model_names_the_runs_before(tmp_path: Path) -> None:
    Run(tmp_path / "p", {}).update(**info(tmp_path, refit=REFIT))
    trained = {"tokens_seen": 4096, "trained_parameters": 12_345, "parameters": 61_000, "groups": record(2).groups}
    first = info(tmp_path, student={"run": str(tmp_path / "p")}, method={"name": "mp"}) | trained
    second = first | {"student": {"run": str(tmp_path / "mp")}, "method": {"name": "kd"}}
    card = distilled_card(second, first)
    places = [card.index(word) for word in ("`sleb`", "Repaired", f"`{tmp_path / 'p'}`", "`mp`", "/mp`, with", "`kd`")]
    assert places == sorted(places) and "12.3K of 61.0K parameters" in card
    assert "`mp`" in distilled_card(second, first | {"student": {"run": "gone"}})
