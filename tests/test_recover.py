"""The table of all distillations, on tiny models: both starts, equal tokens, equal seconds, one run at a time."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from cli import exit_code
from conftest import save_tiny, tiny_text

from benchmarks import recover
from come_pl.cli.prune import prune_main
from come_pl.cli.train import train_main

COLUMNS = "start method tokens seconds before perplexity times_dense trained_parameters tokens_per_second peak_gib"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts run in this process: what is tested is what is asked of them and made of their results."""
    save_tiny(tmp_path / "dense", layers=5)
    tiny_text(tmp_path / "text.txt", words=6000)
    tiny_text(tmp_path / "held.txt", words=1000, seed=1)
    mains = {"prune.py": prune_main, "train.py": train_main}
    monkeypatch.setattr(
        recover, "call", lambda script, *words: exit_code(mains[script], script, *words, monkeypatch=monkeypatch)
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recovered(home: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    fixed = ["--source", home / "text.txt", "--evaluation", home / "held.txt", "--evaluation_tokens", 128]
    fixed += ["--tokens", 128, "--seqlen", 16, "--batch_size", 2, "--output", "out"]
    machine = ["--", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    machine += ["--data.validation_tokens", 64, "--trainer.precision", "32-true"]
    monkeypatch.setattr("sys.argv", ["recover", *map(str, [*fixed, *words, *machine])])
    return recover.main()


def test_both_starts_at_equal_tokens_and_seconds(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--start", "plain", "refit", "--model", home / "dense", "--target_layers", 3, "--calibration_tokens", 256)
    words = (*words, "--methods", "mp", "lora")
    assert recovered(home, monkeypatch, *words) == 0
    results = json.loads((home / "out" / "recover.json").read_text())
    (rows,) = results.values()
    assert [(r["start"], r["method"]) for r in rows] == [
        (start, method) for start in ("plain", "refit") for method in ("mp", "lora")
    ]
    for found in rows:
        info = json.loads((home / "out" / f"{found['start']}-{found['method']}-128" / "run.json").read_text())
        (entry,) = info["perplexity"].values()
        assert " ".join(found) == COLUMNS and found["tokens"] == 128
        assert found["times_dense"] == pytest.approx(entry["after"] / entry["dense"], abs=1e-3)
        assert found["trained_parameters"] == info["trained_parameters"] > 0
    assert rows[0]["before"] != rows[2]["before"]  # the two starts are two models

    # once more with a table at equal seconds, one run gone: only that one and the new ones are trained
    one = home / "out" / "plain-lora-128"
    shutil.rmtree(one)
    kept = {f: f.stat().st_mtime_ns for f in (home / "out").glob("*/run.json")}
    seconds = 64.5 / rows[0]["tokens_per_second"]  # two batches of mp from the plain start
    assert recovered(home, monkeypatch, *words, "--seconds", seconds) == 0
    assert all(f.stat().st_mtime_ns == at for f, at in kept.items()) and (one / "model").is_dir()
    again, timed = json.loads((home / "out" / "recover.json").read_text()).values()
    assert [r for r in again if r["method"] == "mp"] == [r for r in rows if r["method"] == "mp"]
    for found, speed in zip(timed, again, strict=True):
        assert found["tokens"] == max(1, int(speed["tokens_per_second"] * seconds) // 32) * 32
    assert timed[0]["tokens"] == 64
    with open(home / "out" / "recover.csv", newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert " ".join(lines[0]) == "table " + COLUMNS
    assert [float(line["perplexity"]) for line in lines] == [r["perplexity"] for r in again + timed]
    assert "| start | method | tokens |" in (home / "out" / "recover.md").read_text()


def test_a_run_that_fails_is_left_out(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert recovered(home, monkeypatch, "--student", home / "dense", "--methods", "mp") == 1
    error = capsys.readouterr().err
    assert "holds no run of come_pl" in error and "failed, and left out: given-mp-128" in error
    with pytest.raises(SystemExit):
        recovered(home, monkeypatch, "--student", "x", "--start", "plain")
