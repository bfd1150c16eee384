"""The pictures of a run: shares by hand, files and their text alternatives, records with holes in them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from come_pl.report import importance, merge_map, shares, tables
from come_pl.report.layers import _caption
from come_pl.report.repair import repair_words
from come_pl.report.story import read_story
from come_pl.report.style import amount
from come_pl.report.tables import merges


def synthetic(dense: int, final: int, kind: str = "merge", item: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Steps as the pruner records them, with scores that fall towards three quarters of the depth."""
    rng = random.Random(seed)
    steps: list[dict[str, Any]] = []
    groups = [[layer] for layer in range(dense)]
    base = [0.004 + 0.9 * abs((layer + 0.5) / dense - 0.75) ** 3 + 0.002 * rng.random() for layer in range(dense)]
    while len(groups) > final:
        count = 1 if kind == "drop" else min(item, len(groups) - final + 1)
        influence = [sum(base[t] for t in group) for group in groups]
        sites = range(len(groups) - count + 1)
        spans: list[float | None] = [sum(influence[i : i + count]) * (1 + 0.1 * rng.random()) for i in sites]
        spans[0] = spans[-1] = None
        site = min((i for i in sites if spans[i] is not None), key=lambda i: spans[i] or 0.0)
        chosen = list(range(site, site + count))
        weights = [influence[i] ** 0.3 for i in chosen]
        if kind == "drop":
            groups = [*groups[: site - 1], groups[site - 1] + groups[site], *groups[site + 1 :]]
        else:
            groups = [*groups[:site], [t for i in chosen for t in groups[i]], *groups[site + count :]]
        number = len(steps) + 1
        steps.append(
            {
                "step": number,
                "kind": kind,
                "layers": chosen,
                "ratio": None if kind == "drop" else [w / sum(weights) for w in weights],
                "kept": [{"kv_heads": [0], "neurons": "0f"} for _ in chosen],
                "norm": "mean",
                "scores": {"block_influence": influence, "span_distance": spans, "ratio_losses": [3.2, 3.1, 3.3]},
                "groups": groups,
                "seconds": 3.2,
                "peak_gib": 1.1,
                "loss": 3.3 + 0.03 * number**1.6,
                "kl": 0.02 * number**1.7,
            }
        )
    return steps


def write(folder: Path, steps: list[dict[str, Any]], run: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    return folder


def run_file(dense: int, name: str = "come") -> dict[str, Any]:
    return {
        "model": {"path": "/models/SmolLM-135M", "layers": dense},
        "method": {"name": name},
        "perplexity": {"embedded": {"dense": 28.6, "pruned": 165.2}},
    }


def picture(path: Path) -> tuple[tuple[int, int], str]:
    with Image.open(path) as image:
        image.load()
        return image.size, str(image.info["Description"])


def test_shares_of_repeated_merges_and_drops() -> None:
    steps: list[dict[str, Any]] = [
        {"kind": "merge", "layers": [2, 3], "ratio": [0.6, 0.4], "groups": [[0], [1], [2, 3], [4], [5], [6]]},
        {"kind": "merge", "layers": [2, 3], "ratio": [0.5, 0.5], "groups": [[0], [1], [2, 3, 4], [5], [6]]},
        {"kind": "drop", "layers": [3], "ratio": None, "groups": [[0], [1], [2, 3, 4, 5], [6]]},
        {"kind": "merge", "layers": [2, 3], "ratio": [0.8, 0.2], "groups": [[0], [1], [2, 3, 4, 5, 6]]},
        {"kind": "drop", "layers": [0], "ratio": None, "groups": [[0, 1], [2, 3, 4, 5, 6]]},
    ]
    got = shares(steps, 7)
    assert got[0] == {0: 0.0, 1: 1.0}
    assert got[1] == pytest.approx({2: 0.24, 3: 0.16, 4: 0.4, 5: 0.0, 6: 0.2})
    assert [list(layer) for layer in got] == [[0, 1], [2, 3, 4, 5, 6]]
    bare = [{key: value for key, value in step.items() if key != "groups"} for step in steps]
    assert shares(bare, 7)[1] == pytest.approx(got[1])


def test_shares_of_a_three_layer_merge_and_of_nothing() -> None:
    assert shares([], 2) == [{0: 1.0}, {1: 1.0}]
    step = {"kind": "merge", "layers": [1, 2, 3], "ratio": [2, 1, 1], "groups": [[0], [1, 2, 3]]}
    assert shares([step], 4) == [{0: 1.0}, {1: 0.5, 2: 0.25, 3: 0.25}]
    assert shares([{"kind": "merge", "layers": [0, 1]}], 2) == [{0: 0.5, 1: 0.5}]
    assert all(abs(sum(layer.values()) - 1) < 1e-9 for layer in shares(synthetic(30, 12, item=3), 30))


def test_shares_of_a_dropped_merged_layer() -> None:
    steps: list[dict[str, Any]] = [
        {"kind": "merge", "layers": [1, 2], "ratio": [0.5, 0.5]},
        {"kind": "drop", "layers": [1]},
    ]
    assert shares(steps, 4) == [{0: 1.0, 1: 0.0, 2: 0.0}, {3: 1.0}]


@pytest.mark.parametrize(
    "step",
    [
        {"step": 1, "kind": "merge", "layers": [3, 4], "ratio": [0.5, 0.5]},
        {"step": 1, "kind": "merge", "layers": [0, 1], "ratio": [0.5, 0.5], "groups": [[0], [1, 2], [3]]},
        {"step": 1, "kind": "merge", "layers": [0, 1], "ratio": [0.5, 0.3, 0.2]},
        {"step": 1, "kind": "drop", "layers": [0, 1, 2, 3]},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(step: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="step 1"):
        shares([step], 4)


@pytest.mark.parametrize(
    ("dense", "final", "kind", "item"), [(30, 21, "merge", 2), (80, 50, "merge", 3), (12, 8, "drop", 1)]
)
def test_pictures_and_their_text_alternatives(tmp_path: Path, dense: int, final: int, kind: str, item: int) -> None:
    folder = write(tmp_path / "run", synthetic(dense, final, kind, item), run_file(dense))
    size, words = picture(merge_map(folder))
    assert 900 < size[0] < 1600 and dense * 25 < size[1] < dense * 40 + 600
    assert f"{dense} layers became {final}" in words and "28.6 → 165.2 (5.78×)" in words
    assert ("Dropped: " in words) == (kind == "drop") and ("Merged layers" in words) == (kind == "merge")
    size, words = picture(importance(folder))
    assert 1200 < size[0] < 2200 and 600 < size[1] < 2600
    assert "block influence, span distance" in words and f"with {final} layers left" in words
    assert sorted(file.name for file in folder.iterdir()) == [
        "importance.png",
        "merge_map.png",
        "record.jsonl",
        "run.json",
    ]


def test_another_path_is_honoured(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", synthetic(8, 6), run_file(8))
    target = tmp_path / "new" / "map.png"
    assert merge_map(folder, target) == target and target.exists()
    assert importance(folder, tmp_path / "new" / "scores.png").exists()


@pytest.mark.parametrize(
    "absent", ["scores", "loss", "kl", "groups", "ratio", "block_influence", "span_distance", "everything"]
)
def test_missing_keys(tmp_path: Path, absent: str) -> None:
    steps = synthetic(10, 6)
    for step in steps:
        for key in ("scores", "loss", "kl") if absent == "everything" else (absent,):
            step.pop(key, None)
            step.get("scores", {}).pop(key, None)
    folder = write(tmp_path / "run", steps, run_file(10) if absent == "groups" else None)
    assert "10 layers became 6" in picture(merge_map(folder))[1]
    words = picture(importance(folder))[1]
    assert ("no layer scores" in words) == (absent in ("scores", "everything"))


def test_steps_that_were_not_measured(tmp_path: Path) -> None:
    """One point is no curve; the number is told all the same."""
    steps = synthetic(10, 6)
    every = write(tmp_path / "every", steps, run_file(10))
    size, _ = picture(importance(every))
    told = "none was measured"
    [table] = tables.steps(read_story(every))
    assert told not in table.note
    for step in steps[:-1]:
        step["loss"] = step["kl"] = None
    last = write(tmp_path / "last", steps, run_file(10))
    lower, words = picture(importance(last))
    assert lower[0] == size[0] and lower[1] < size[1] - 150 and "Calibration loss ends at" in words
    [table] = tables.steps(read_story(last))
    assert told in table.note and table.rows[0][4:6] == ["–", "–"] and "–" not in table.rows[-1][4:6]
    sizes = []
    for name, found in (("one point", steps), ("a curve", synthetic(10, 6))):
        bare = [step | {"scores": {}} for step in found]
        sizes.append(picture(importance(write(tmp_path / name, bare, run_file(10))))[0])
    assert sizes[0] == sizes[1], "where there is nothing else to see, it is drawn"


def test_other_scores_and_empty_runs(tmp_path: Path) -> None:
    steps = synthetic(6, 5)
    steps[0]["scores"] = {"loss_without": [3.0, 3.1, 3.2, 3.1, None, 3.0], "ratio_losses": [1, 2, 3], "odd": [1, 2]}
    assert "loss without" in picture(importance(write(tmp_path / "a", steps, {})))[1]
    empty = write(tmp_path / "b", [], {"model": {"layers": 4}, "perplexity": None})
    assert "none merged or dropped" in picture(merge_map(empty))[1]
    importance(empty)
    (tmp_path / "c").mkdir()
    merge_map(tmp_path / "c")
    importance(tmp_path / "c")


def test_whose_channels_a_repaired_layer_has(tmp_path: Path) -> None:
    steps = synthetic(8, 6, "drop", 1)
    before = merges(read_story(write(tmp_path / "plain", steps, run_file(8))))[0]
    assert len(before.columns) == 3
    assert _caption(steps, False, True).endswith("Hatched: dropped, none of its weights are kept.")
    groups = [group for group in steps[-1]["groups"] if len(group) > 1]
    kept = {layer: 1 / len(group) for group in groups for layer in group}
    steps[-1]["scores"]["channels_kept"] = [kept.get(layer) for layer in range(8)]
    assert "none of its weights" not in _caption(steps, False, True)
    table = merges(read_story(write(tmp_path / "run", steps, run_file(8))))[0]
    assert table.columns[-1] == "its feed-forward channels come from" and "chose the feed-forward" in table.note
    expected = [", ".join(f"{layer} ({kept[layer]:.0%})" for layer in group) for group in groups]
    assert [row[-1] for row in table.rows] == expected and len(groups) == len(table.rows) > 0
    assert [row[:-1] for row in table.rows] == before.rows


def test_repair_in_words() -> None:
    best = {"parts": "all", "when": "end", "sweep": 0, "channels": "group", "final": True, "last": 12}
    said = repair_words(best)
    assert "at the target depth in every layer from the lowest changed one up" in said and "after each" not in said
    assert "and the projections that read" in said and "MLP channels of all" in said
    assert "gains of the final norm" in said and "last layers (12 at most)" in said
    assert repair_words(best, whole=False) == "Not repaired: the run does that at its target depth only."
    step = best | {"parts": "down", "when": "step", "last": 0}
    said = repair_words(step)
    assert "after each step in the layer that changed, the MLP's output projection was solved" in said
    assert "channels" not in said and "gains of the final norm" in said and "last layers" not in said
    said = repair_words(step, whole=False)
    assert "gains" not in said and said.endswith("What the run repairs at its target depth is not in this model.")
    assert "not in this" not in repair_words(step | {"final": False}, whole=False)
    assert repair_words(None) == repair_words({"parts": "none"}) == ""


def test_amounts_of_parameters() -> None:
    assert [amount(n) for n in (134_515_008, 1_000_000, 12_345, 60)] == ["134.5M", "1.0M", "12.3K", "0.1K"]
