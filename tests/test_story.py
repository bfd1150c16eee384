"""What a page says of several runs: trainings after each other, tasks asked in two ways, folders of one name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_html import PERPLEXITY, Page, distilled, pruned

from come_pl.cli.report import report_main
from come_pl.report import tables, write_report
from come_pl.report.story import bars, main_text, read_story, summary, tiles

WINDOWS = {"tokens": 16352, "seqlen": 512}


def test_a_training_that_made_it_worse_has_won_nothing(tmp_path: Path) -> None:
    parent = pruned(tmp_path / "p", perplexity={"held.txt": entry(dense=20.0, pruned=40.0)})
    worse = distilled(tmp_path / "d", parent, perplexity={"held.txt": entry(dense=20.0, before=40.0, after=42.0)})
    [tile] = [tile for tile in tiles(read_story(worse)) if "42.00" in tile.words]
    assert (tile.heading, tile.value, tile.tone) == ("Lost by training", "7% more", "cost")


@pytest.mark.parametrize(
    ("before", "after", "compared"),
    [
        ({}, {}, True),
        ({"fingerprint": "a"}, {"fingerprint": "a"}, True),
        ({}, {"fingerprint": "a"}, True),  # of an earlier version
        ({"fingerprint": "a"}, {"fingerprint": "b"}, False),
        ({}, {"tokens": 64}, False),
    ],
)
def test_what_was_measured_on_other_windows_is_not_compared(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], compared: bool
) -> None:
    parent = pruned(tmp_path / "p", perplexity={"held.txt": PERPLEXITY | before})
    end = {"tokens": PERPLEXITY["tokens"], "seqlen": PERPLEXITY["seqlen"], "after": 60.0}
    folder = distilled(tmp_path / "d", parent, perplexity={"held.txt": end | after})
    row = read_story(folder).perplexity["held.txt"]
    assert row["recovered"] == 60.0 and ({"dense", "pruned"} <= row.keys()) == compared


def entry(**perplexity: float) -> dict[str, Any]:
    return WINDOWS | perplexity


def twice(folder: Path, first: dict[str, Any], second: dict[str, Any] | None) -> Path:
    """The second training of a model that was pruned, and measured on one text then."""
    known = {"held.txt": entry(dense=20.0, pruned=180.0)}
    parent = distilled(folder / "d1", pruned(folder / "p", perplexity=known), perplexity=first)
    return distilled(folder / "d2", parent, student={"run": str(parent), "groups": [[0]] * 8}, perplexity=second)


def test_a_second_training_is_told_by_its_own_texts(tmp_path: Path) -> None:
    first = {"held.txt": entry(dense=20.0, before=180.0, after=103.5)}
    folder = twice(tmp_path, first, {"other.txt": entry(dense=10.0, before=60.0, after=30.0)})
    story = read_story(folder)
    assert story.perplexity["held.txt"] == WINDOWS | {"dense": 20.0, "pruned": 180.0}
    assert story.perplexity["other.txt"] == WINDOWS | {"dense": 10.0, "recovered": 30.0}
    assert main_text(story)[0] == "other.txt" and "took perplexity" not in summary(story)
    assert summary(story).endswith("training on 98,304 tokens (CoMe-mp) brought perplexity to 30.00 (3.00×).")
    assert [(stage, value) for stage, _, value in bars(story)] == [("dense", "10.00"), ("recovered", "30.00")]
    told = [[tile.heading, tile.value] for tile in tiles(story)]
    assert ["Won back", "perplexity 30.00"] in told and "What it cost" not in dict(told)
    [table] = tables.quality(story)
    assert table.rows == [
        ["held.txt", "16,352", "20.00", "180.0", "–", "9.00×", "–"],
        ["other.txt", "16,352", "10.00", "–", "30.00", "–", "3.00×"],
    ]
    assert "103.5" not in Page(write_report([folder])).text


def test_a_second_training_on_the_same_text(tmp_path: Path) -> None:
    first = {"held.txt": entry(dense=20.0, before=180.0, after=103.5), "more.txt": entry(dense=9.0, before=50.0)}
    second = {"held.txt": entry(dense=20.0, before=103.5, after=60.0), "more.txt": entry(dense=9.0, before=40.0)}
    story = read_story(twice(tmp_path, first, second))
    assert story.perplexity["held.txt"] == WINDOWS | {"dense": 20.0, "pruned": 180.0, "recovered": 60.0}
    assert story.perplexity["more.txt"] == WINDOWS | {"dense": 9.0, "pruned": 50.0}
    assert "from 20.00 to 180.0 (9.00×); training" in summary(story) and "brought it to 60.00" in summary(story)


def test_a_second_training_without_a_text(tmp_path: Path) -> None:
    story = read_story(twice(tmp_path, {"held.txt": entry(dense=20.0, before=180.0, after=103.5)}, {}))
    assert "from 20.00 to 180.0" in summary(story) and "brought" not in summary(story)


def evaluated(folder: Path, **tasks: tuple[int, int, float, float]) -> None:
    """Adds what come-eval leaves of tasks: examples, questions, the model's score and the dense one's."""
    found = {
        name: {
            "shots": shots,
            "model": {"score": mine, "stderr": 0.03, "samples": questions},
            "dense": {"score": dense, "stderr": 0.04, "samples": questions},
            "kept": mine / dense,
        }
        for name, (shots, questions, mine, dense) in tasks.items()
    }
    average = {"tasks": len(tasks), "model": {"score": 0.9, "stderr": 0.0}, "dense": {"score": 0.9, "stderr": 0.0}}
    (folder / "eval.json").write_text(json.dumps({"tasks": found, "average": average | {"kept": 1.0}}))


def tasks_of(folder: Path) -> tables.Table:
    return next(table for table in tables.quality(read_story(folder)) if table.caption == "Tasks")


def test_tasks_are_compared_where_they_were_asked_alike(tmp_path: Path) -> None:
    parent = pruned(tmp_path / "p")
    folder = distilled(tmp_path / "d", parent)
    evaluated(parent, a=(0, 100, 0.3, 0.5), b=(0, 100, 0.4, 0.8), c=(0, 100, 0.2, 0.4))
    evaluated(folder, c=(0, 100, 0.3, 0.4), b=(0, 100, 0.6, 0.8), a=(5, 9000, 0.7, 0.75))
    table = tasks_of(folder)
    assert table.rows == [
        ["a", "0", "100", "50.0 ± 4.0", "30.0 ± 3.0", "–", "60.0%", "–"],
        ["a", "5", "9000", "75.0 ± 4.0", "–", "70.0 ± 3.0", "–", "93.3%"],
        ["b", "0", "100", "80.0 ± 4.0", "40.0 ± 3.0", "60.0 ± 3.0", "50.0%", "75.0%"],
        ["c", "0", "100", "40.0 ± 4.0", "20.0 ± 3.0", "30.0 ± 3.0", "50.0%", "75.0%"],
        ["average", "", "", "60.0 ± 2.8", "30.0 ± 2.1", "45.0 ± 2.1", "50.0%", "75.0%"],
    ]
    assert table.note.endswith("The average is of the rows without a gap.")


def test_tasks_with_nothing_in_common_have_no_average(tmp_path: Path) -> None:
    parent = pruned(tmp_path / "p")
    folder = distilled(tmp_path / "d", parent)
    evaluated(parent, a=(0, 100, 0.3, 0.5), b=(0, 100, 0.4, 0.8))
    evaluated(folder, a=(5, 9000, 0.7, 0.75))
    table = tasks_of(folder)
    assert [row[0] for row in table.rows] == ["a", "a", "b"] and "average" not in table.note
    table = tasks_of(parent)
    assert table.rows[-1][3:] == ["65.0 ± 2.8", "35.0 ± 2.1", "53.8%"] and "average" not in table.note


def test_runs_of_one_name_have_anchors_of_their_own(tmp_path: Path) -> None:
    folders = [pruned(tmp_path / above / "run") for above in ("a", "b")]
    page = Page(write_report(folders, tmp_path / "page"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {a["href"] for a in page.all("a")} == {f"#{i}" for i in ids}


@pytest.mark.parametrize("option", [("--new_tokens", "50"), ("--dtype", "bfloat16")])
def test_settings_of_continuations_that_are_not_asked_for(
    tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pruned(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["come-report", str(folder), *option])
    with pytest.raises(SystemExit) as stop:
        report_main()
    said = f"error: {' '.join(option)} is for continuations, which are not asked for; add --samples\n"
    assert stop.value.code == 2 and capsys.readouterr().err == said
    assert not (folder / "report.html").exists()
