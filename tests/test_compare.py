"""`come-compare` on tiny models: the table, going on, runs that fail, and every way to get it wrong."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cli import exit_code
from conftest import save_tiny, tiny_text
from PIL import Image

from come_pl.cli.compare import compare_main
from come_pl.cli.prune import prune_main
from come_pl.report.methods import _apart, plots
from come_pl.runs import read_run
from come_pl.workflows import compare as workflow
from come_pl.workflows.compare import read_contender, read_contenders


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished(tmp_path_factory.mktemp("compare"))


def furnished(folder: Path) -> Path:
    """A folder with a model, text to calibrate on and text held out."""
    save_tiny(folder / "model", layers=6)
    tiny_text(folder / "text.txt")
    tiny_text(folder / "held.txt", seed=1)
    return folder


def arguments(home: Path, *more: object) -> list[str]:
    fixed = ["--model", home / "model", "--calibration", home / "text.txt", "--tokens", 256, "--seqlen", 16]
    fixed += ["--evaluation", home / "held.txt", "--evaluation_tokens", 128]
    return [str(word) for word in [*fixed, *more]]


def compared(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs the command; its exit code."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return exit_code(compare_main, "come-compare", *words, monkeypatch=monkeypatch)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "comparison.csv", newline="") as opened:
        return list(csv.DictReader(opened))


def test_table_resume_and_a_method_that_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = home / "out"
    words = arguments(
        home,
        "--output",
        output,
        "--depths",
        4,
        5,
        "--seed",
        3,
        "--methods",
        "come:norm=fold,final=false,label=come norm=fold",
        "come:rho=7",
    )
    assert compared(monkeypatch, *words) == 1
    rows = table(output)
    assert [(r["method"], r["layers"], r["status"]) for r in rows] == [
        ("come norm=fold", "5", "finished"),
        ("come rho=7", "5", "failed"),
        ("come norm=fold", "4", "finished"),
        ("come rho=7", "4", "failed"),
    ]
    assert all("rho 7" in r["error"] for r in rows[1::2])
    for row in rows[::2]:
        info = read_run(Path(row["run"]))
        assert len(info["groups"]) == 4 and info["seed"] == 3  # one run, measured on its way
        found = info["depths"]["5"] if row["layers"] == "5" else info | {"seconds": info["seconds"]["prune"]}
        entry = found["perplexity"][str(home / "held.txt")]
        assert float(row["perplexity"]) == entry["pruned"]
        assert float(row["times_dense"]) == pytest.approx(entry["pruned"] / entry["dense"], abs=1e-4)
        assert float(row["quality_kept"]) == pytest.approx(entry["dense"] / entry["pruned"], abs=1e-4)
        assert float(row["seconds"]) == found["seconds"] and float(row["peak_gib"]) == found["peak_gib"]
        assert row["calibration_tokens"] == "256" and info["data"]["seqlen"] == 16
        assert info["method"]["norm"] == "fold"
        assert (Path(row["run"]) / "record.jsonl").is_file() and not (Path(row["run"]) / "model").exists()
        assert "--keep_models" in info["model_removed"]
    saved = json.loads((output / "comparison.json").read_text())
    assert saved["settings"]["layers"] == 6 and len(saved["rows"]) == 4
    page = (output / "comparison.md").read_text()
    assert "| come norm=fold | 4 |" in page and "failed: " in page
    with Image.open(output / "comparison.png") as image:
        assert "come norm=fold" in image.info["Title"] and "Failed: come rho=7 at 4" in image.info["Description"]

    started: list[list[str]] = []
    start = workflow._start
    monkeypatch.setattr(workflow, "_start", lambda given, log: started.append(given) or start(given, log))
    finished = {r["run"]: (Path(r["run"]) / "run.json").stat().st_mtime_ns for r in rows[::2]}
    assert compared(monkeypatch, *words) == 1
    assert [a for given in started for a in given if "rho" in a] == ["--method.rho=7"] * 2 and len(started) == 2
    assert {run: (Path(run) / "run.json").stat().st_mtime_ns for run in finished} == finished

    started.clear()  # asked for the models, it makes them again
    assert compared(monkeypatch, *words[:-1], "--keep_models") == 0
    assert len(started) == 1 and "--overwrite=true" in started[0]
    assert all((Path(run) / "model" / "model.safetensors").is_file() for run in finished)
    assert [r["perplexity"] for r in table(output)] == [r["perplexity"] for r in rows[::2]]

    assert compared(monkeypatch, *words[:-1]) == 0 and len(started) == 1  # runs nothing, and takes nothing away
    assert all((Path(run) / "model" / "model.safetensors").is_file() for run in finished)


@pytest.mark.parametrize(
    ("method", "runs"),
    [
        ("sleb", 1),
        ("come:refit=down,final=false", 1),
        ("come:refit=down", 2),
        ("come:sweep=1", 2),
        ("shortgpt:angular=true", 2),
    ],
)
def test_a_depth_on_the_way_is_what_a_run_to_it_gives(
    method: str, runs: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(given: list[str], log: Path) -> str | None:
        code = exit_code(prune_main, "prune.py", *given, monkeypatch=monkeypatch)
        return f"exit code {code}" if code else None

    monkeypatch.setattr(workflow, "_start", here)
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert compared(monkeypatch, *arguments(home, "--output", both, "--depths", 4, 5, "--methods", method)) == 0
    assert compared(monkeypatch, *arguments(home, "--output", alone, "--depths", 5, "--methods", method)) == 0
    assert table(both)[0]["perplexity"] == table(alone)[0]["perplexity"]
    assert len(list((both / "runs").iterdir())) == runs


def test_a_run_that_was_killed_is_told_and_the_rest_go_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = home / "killed"
    start = workflow._start

    def fake(given: list[str], log: Path) -> str | None:
        if "--target_layers=5" not in given:
            return start(given, log)
        monkeypatch.setattr(sys, "executable", "/bin/sh")
        script = log.parent / "kill"
        log.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("kill -9 $$")
        real = workflow.subprocess.run
        monkeypatch.setattr(workflow.subprocess, "run", lambda command, **o: real(["/bin/sh", str(script)], **o))
        found = start(given, log)
        monkeypatch.undo()
        return found

    monkeypatch.setattr(workflow, "_start", fake)
    words = arguments(home, "--output", output, "--depths", 5, "--methods", "come")
    assert compared(monkeypatch, *words) == 1
    assert table(output)[0]["error"] == "killed by signal 9 (out of memory?)"
    assert not (output / "comparison.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "comee"], "method 'comee' is not known"),
        (["--methods", "come:rho"], "'rho' is not an option; expected NAME:OPTION=VALUE"),
        (["--methods", "come:rho=1,rho=2"], "each option once"),
        (["--methods", "come:name=sleb"], "'name=sleb' is not an option"),
        (["--methods", "come", "shortgpt:rho=3"], "method 'shortgpt:rho=3' has no option 'rho'; its options: angular"),
        (["--methods", "come:roh=1"], "did you mean 'rho'?"),
        (["--seed", "-1"], "--seed -1: expected a whole number from 0 to 4294967295"),
        (["--methods", "come", "come"], "in the list already"),
        (["--methods", "come:label=a", "come:label=b"], "is the same as 'a'"),
        (["--depths", "6"], "target_layers 6: the model has 6 layers; expected a depth from 1 to 5"),
        (["--depths", "x"], "depths"),
        (["--model", "./nothing"], "'./nothing' does not exist"),
        (["--no_such", "1"], "no_such"),
        (["--", "--data.tokens", "5"], "say --tokens before the '--'"),
        (
            ["--", "--config", "set.yaml"],
            "--data.nsamples in a --config after '--': every run gets the same; say --tokens",
        ),
        (["--output", "model/config.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(workflow, "_start", lambda *_: pytest.fail("nothing is to be run"))
    (home / "set.yaml").write_text("nsamples: 8\nmodel: {dtype: bfloat16}\n")
    assert compared(monkeypatch, *arguments(home, "--output", home / "bad"), *words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (home / "bad").exists()


def test_methods_are_read() -> None:
    first = read_contender("come:wo-repeat=false,label=mine")
    assert first.label == "mine" and first.arguments == ["--method.name=come", "--method.wo_repeat=false"]
    assert read_contender("come:p=[1,2],rho=0.5").options == (("p", "[1,2]"), ("rho", "0.5"))
    repaired = read_contender("sleb:refit=all,refit_when=step,weighting=uniform,windows=2").arguments
    assert repaired[1:] == ["--refit.parts=all", "--refit.when=step", "--refit.weighting=uniform", "--method.windows=2"]
    assert [c.label for c in read_contenders(["come", "come:rho=0.5"])] == ["come", "come rho=0.5"]


def test_default_is_every_method_at_the_usual_shares(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from come_pl.pruning.methods import METHODS

    monkeypatch.setattr(workflow, "_start", lambda given, log: "not run")
    assert compared(monkeypatch, *arguments(home, "--output", home / "all"), "--", "--model.dtype", "bfloat16") == 1
    rows = table(home / "all")
    assert {(r["method"], r["layers"]) for r in rows} == {(name, depth) for name in METHODS for depth in "54"}


def row(method: str, layers: int, times: float, text: str = "a.txt") -> dict:
    return {
        **{"method": method, "layers": layers, "text": text, "status": "finished", "times_dense": times},
        **{"perplexity": 20 * times, "dense": 20.0, "calibration_tokens": 256, "evaluation_tokens": 128},
    }


def test_plot_of_many_methods(tmp_path: Path) -> None:
    settings = {"model": "models/tiny", "layers": 30, "calibration": "c.txt", "tokens": 256, "seqlen": 16, "seed": 0}
    rows = [row(f"method{i:02}", d, 1 + (i + 1) * (30 - d) / 10) for d in (27, 21) for i in range(16)]
    rows += [row("method00", 21, 3.0, "b.txt"), row("method01", 21, 2.0, "b.txt") | {"times_dense": None}]
    rows = [each | {"seconds": 100.0 - 6 * int(each["method"][-2:])} for each in rows]
    one, fast, two, _ = plots(rows, settings, tmp_path)
    with Image.open(fast) as image:
        # of those that cost at most twice as much as the best: method02, 3.70×, 88 s
        assert (
            "method00 loses least, 1.90× the dense perplexity in 100 s; method02 takes 88 s, with 3.70×"
            in (image.info["Title"])
        )
    with Image.open(one) as image:
        assert "method00 loses least at every depth: 1.90× the dense perplexity at 21 of 30" in image.info["Title"]
        assert all(f"method{i:02}: 27 layers" in image.info["Description"] for i in range(16))
    with Image.open(two) as image:
        assert "b.txt" in image.info["Description"] and two.name == "comparison-2.png"


def test_labels_do_not_overlap() -> None:
    wanted = sorted(np.random.default_rng(0).random(12) ** 4)
    placed = _apart(wanted, 0.08, 0.0, 1.0)
    assert (np.diff(placed) >= 0.08 - 1e-12).all() and placed[0] >= 0 and placed[-1] <= 1
    assert _apart([0.2, 0.9], 0.08, 0, 1) == [0.2, 0.9]
    assert _apart([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
