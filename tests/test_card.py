"""Model cards: the repair, depths on the way, and where a distilled model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from come_pl.record import Record, Step
from come_pl.runs import Run
from come_pl.workflows import card as cards
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


TRAINED = {"tokens_seen": 4096, "trained_parameters": 12_345, "parameters": 61_000, "groups": [[0, 1], [2]]}


def test_what_a_second_training_began_with_is_not_called_pruned(tmp_path: Path) -> None:
    entry = {"tokens": 480, "dense": 20.0, "before": 80.0, "after": 40.0}
    Run(tmp_path / "p", {}).update(**info(tmp_path))
    first = info(tmp_path, student={"run": str(tmp_path / "p")}, perplexity={"held.txt": entry}) | TRAINED
    second = first | {"student": {"run": str(tmp_path / "mp")}}
    heads = "| held-out text | tokens | dense perplexity | {} | this model | quality kept |"
    assert heads.format("pruned") in distilled_card(first, info(tmp_path))
    assert heads.format("before") in distilled_card(second, first)


@pytest.mark.parametrize(
    ("method", "taught"),
    [
        ({"name": "kd"}, True),
        ({"name": "hybrid"}, True),
        ({"name": "lm"}, False),
        ({"name": "lora", "objective": "lm"}, False),
        ({"name": "lora"}, False),
        ({"name": "lora", "objective": "kd"}, True),
    ],
)
def test_training_on_text_is_no_distillation(tmp_path: Path, method: dict[str, str], taught: bool) -> None:
    trained = info(tmp_path, student={"run": "p"}, method=method) | TRAINED
    card = distilled_card(trained, info(tmp_path))
    assert ("Distilled from the dense model, beginning with the run `p`" in card) == taught
    assert ("Trained on text, beginning with the run `p`" in card) != taught
    assert ("layers, distilled" in card and "tags: [distilled, " in card) == taught
    assert f"That of the base model, {tmp_path}" in card
    after = distilled_card(trained | {"student": {"run": "d"}}, trained | {"method": {"name": "mp"}})
    assert "layers, distilled" in after  # before or now


def test_a_local_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/tiny").mkdir(parents=True)
    monkeypatch.setattr(cards, "licence", lambda path: None)
    for path, named in (("models/tiny", False), ("nobody/has-this", True)):
        text = pruned_card(info(tmp_path, model={"path": path, "layers": 6}), record(2))
        assert (f"base_model: {path}" in text) == named and f"# {path}, 6 → 4 layers" in text
