"""Small models of several families, trained and pruned by the defaults."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from cli import exit_code
from conftest import tiny_text

from benchmarks import families
from come_pl.cli.prune import prune_main
from come_pl.decoder import family_of


def test_models_are_trained_and_pruned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        families, "call", lambda script, *words: exit_code(prune_main, script, *words, monkeypatch=monkeypatch)
    )
    monkeypatch.chdir(tmp_path)
    words = ["--families", "opt", "--source", tiny_text(tmp_path / "t.txt", 8000), "--tokens", 512, "--seqlen", 32]
    words += ["--evaluation", tiny_text(tmp_path / "held.txt", 2000, seed=1), "--evaluation_tokens", 512]
    words += ["--vocabulary", 300, "--layers", 4, "--target", 3, "--hidden", 64, "--calibration_tokens", 512]
    words += ["--output", "out"]
    assert exit_code(families.main, "families", *words, monkeypatch=monkeypatch) == 0
    (row,) = csv.DictReader((tmp_path / "out" / "families.csv").read_text().splitlines())
    assert row["family"] == "opt" and row["trained_tokens"] == "512" and float(row["dense"]) < 300
    assert float(row["default_times_dense"]) == pytest.approx(float(row["default"]) / float(row["dense"]), abs=2e-3)
    assert row["dropped"] != row["default"]
    made = tmp_path / "out" / "opt" / "model" / "model.safetensors"
    before = made.stat().st_mtime_ns
    assert exit_code(families.main, "families", *words, monkeypatch=monkeypatch) == 0
    assert made.stat().st_mtime_ns == before
    assert list(csv.DictReader((tmp_path / "out" / "families.csv").read_text().splitlines())) == [row]
    assert "| opt |" in (tmp_path / "out" / "families.md").read_text()
    other = [*words, "--lr", "1e-3"]
    monkeypatch.setattr("sys.argv", ["families", *map(str, other)])
    with pytest.raises(SystemExit, match="holds a model of other settings"):
        families.main()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_itself(family: str) -> None:
    assert family_of(families.config(family, 300, 4, 64)).name == family


@pytest.mark.parametrize("words", [["--hidden", "100"], ["--target", "12"], ["--families", "gpt2"]])
def test_bad_input(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        families.read(words)
    assert stop.value.code == 2
