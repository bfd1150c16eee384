"""`come-compare`: tasks of every model, the dense model measured once, calibration tokens of a method's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli import exit_code
from PIL import Image
from questions import questions
from test_compare import arguments, compared, furnished, table

from come_pl.cli.evaluate import evaluate_main
from come_pl.cli.prune import prune_main
from come_pl.runs import RunError, read_run
from come_pl.workflows import compare as workflow
from come_pl.workflows import texts
from come_pl.workflows.compare import _same_ground
from come_pl.workflows.texts import dense_of

MAINS = {"come_pl.cli.prune": (prune_main, "prune.py"), "come_pl.evaluation": (evaluate_main, "come-eval")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, text to calibrate on, text held out and tasks."""
    folder = furnished(tmp_path_factory.mktemp("scores"))
    questions(folder)
    return folder


@pytest.fixture
def started(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Every process is run in this one; what they were started with."""
    found: list[tuple[str, list[str]]] = []

    def here(given: list[str], log: Path, module: str = "come_pl.cli.prune") -> str | None:
        found.append((module, list(given)))
        with monkeypatch.context() as context:
            code = exit_code(*MAINS[module], *given, monkeypatch=context)
        return f"exit code {code}" if code else None

    monkeypatch.setattr(workflow, "_start", here)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    return found


def asking(home: Path, *tasks: str, limit: int = 6) -> list[str]:
    return ["--tasks", *tasks, "--include_path", str(home / "tasks"), "--limit", str(limit)]


def test_every_depth_is_asked_once_and_no_model_is_left(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, list[str]]]
) -> None:
    words = arguments(home, "--output", tmp_path / "out", "--depths", 5, 4, "--methods", "sleb", "come:refit=down")
    words += asking(home, "tiny_choice", "mmlu_tiny=1")
    assert compared(monkeypatch, *words) == 0
    rows = {(row["method"], int(row["layers"])): row for row in table(tmp_path / "out")}
    assert len(rows) == 4 and len({row["run"] for row in rows.values()}) == 3  # sleb passes 5 layers on its way to 4
    assert [module for module, _ in started].count("come_pl.evaluation") == 4
    for (method, depth), row in rows.items():
        run = Path(row["run"])
        name = "eval.json" if read_run(run)["target_layers"] == depth else f"eval-{depth}.json"
        found = json.loads((run / name).read_text())
        assert found["model"]["layers"] == depth and found["dense"]["layers"] == 6 and not found["perplexity"]
        assert {n: (t["shots"], t["limit"]) for n, t in found["tasks"].items()} == {
            "tiny_choice": (0, 6),
            "mmlu_tiny": (1, 6),
        }
        for which, column in (("model", "score"), ("dense", "dense_score")):
            mean = sum(task[which]["score"] for task in found["tasks"].values()) / 2
            assert float(row[column]) == pytest.approx(mean, abs=1e-6), method
        assert not list(run.glob("model*"))
        assert found["model"]["fingerprint"] != found["dense"]["fingerprint"]
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| tasks | tasks kept |" in page and "mean score of tiny_choice, mmlu_tiny, 6 questions of each" in page
    assert "tasks kept" in (tmp_path / "out" / "report.html").read_text()
    with Image.open(tmp_path / "out" / "tasks.png") as image:
        best = max((row for row in rows.values() if row["layers"] == "4"), key=lambda row: float(row["score"]))
        assert f" answers most, {100 * float(best['score']):.1f}% at 4 of 6 layers; dense" in image.info["Title"]
        assert "come refit=down: 5 layers " in image.info["Description"]

    started.clear()
    assert compared(monkeypatch, *words) == 0 and not started  # all is known, without a model
    (Path(rows["sleb", 5]["run"]) / "eval-5.json").unlink()
    deepest = [word for word in words if word != "5"]
    assert compared(monkeypatch, *deepest) == 0 and not started  # nor is what this command does not ask for

    words = [word if word != "6" else "5" for word in words]  # another limit: the models are made again
    assert compared(monkeypatch, *words) == 0
    assert [module for module, _ in started].count("come_pl.cli.prune") == 3
    assert all("--overwrite=true" in given for module, given in started if module == "come_pl.cli.prune")


def test_a_depth_on_the_way_is_asked_as_a_run_to_it_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, list[str]]]
) -> None:
    marks = []
    for name, depths in (("both", [5, 3]), ("alone", [5])):
        output = tmp_path / name
        words = arguments(home, "--output", output, "--depths", *depths, "--methods", "sleb", "--keep_models")
        assert compared(monkeypatch, *words, *asking(home, "tiny_choice")) == 0
        run = Path(table(output)[0]["run"])
        marks.append(json.loads((run / ("eval-5.json" if name == "both" else "eval.json")).read_text())["model"])
        assert sorted(path.name for path in run.glob("model*")) == ["model", "model-5"][: len(depths)]
    assert marks[0]["fingerprint"] == marks[1]["fingerprint"]


def test_a_task_that_fails_is_told_and_the_perplexity_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    words = arguments(home, "--output", tmp_path / "out", "--depths", 5, "--methods", "shortgpt")
    assert compared(monkeypatch, *words, *asking(home, "tiny_choice", "tiny_lost")) == 1
    (row,) = table(tmp_path / "out")
    assert row["status"] == "finished" and float(row["perplexity"]) > 1 and not row["score"]
    assert row["error"].startswith("tasks: task 'tiny_lost' cannot be run")
    assert "What failed" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "tiny_choise"], "did you mean 'tiny_choice'?"),
        (["--tasks", "tiny_choice=x"], "expected NAME or NAME=SHOTS"),
        (["--tasks", "tiny_choice", "--limit", "0"], "limit 0: expected at least 1"),
    ],
)
def test_bad_tasks_are_told_before_anything_is_run(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr(workflow, "_start", lambda *_: pytest.fail("nothing is to be run"))
    words = [*words, "--include_path", str(home / "tasks")]
    assert compared(monkeypatch, *arguments(home, "--output", tmp_path / "bad"), *words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_dense_is_measured_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, list[str]]]
) -> None:
    measured: list[str] = []
    perplexity = texts.perplexity

    def counted(*arguments: Any, title: str = "", **options: Any) -> Any:
        measured.append(title.split()[0])
        return perplexity(*arguments, title=title, **options)

    monkeypatch.setattr(texts, "perplexity", counted)
    output = tmp_path / "out"
    words = arguments(home, "--output", output, "--depths", 5, "--methods", "shortgpt", "sleb", "reverse")
    assert compared(monkeypatch, *words) == 0
    assert measured.count("dense") == 1 and measured.count("pruned") == 3
    assert len({row["dense"] for row in table(output)}) == 1
    first = Path(table(output)[0]["run"])
    info = read_run(first)
    entry = info["perplexity"][str(home / "held.txt")]
    taken = dense_of(str(first), info["model"])[str(home / "held.txt")]
    assert taken == {name: value for name, value in entry.items() if name != "pruned"} and "dense" in taken
    assert not dense_of(str(first), info["model"] | {"dtype": "bfloat16"})
    assert not dense_of(str(first), info["model"] | {"fingerprint": "another"})
    # other windows: measured
    measured.clear()
    more = [f"--evaluation.dense_from={first}", "--samples=false", f"--output={tmp_path / 'other'}"]
    given = [word for word in started[0][1] if not word.startswith(("--evaluation.tokens", "--samples", "--output"))]
    assert exit_code(prune_main, "prune.py", *given, *more, "--evaluation.tokens=64", monkeypatch=monkeypatch) == 0
    assert measured == ["dense", "pruned"]
    # no run there: told at once
    more = [f"--evaluation.dense_from={home}", f"--output={tmp_path / 'none'}"]
    assert exit_code(prune_main, "prune.py", *given, *more, monkeypatch=monkeypatch) == 2
    assert not (tmp_path / "none").exists()
    with pytest.raises(RunError, match="holds no run"):
        dense_of(str(home), info["model"])


def test_tokens_of_a_method_and_its_own_options_over_those_of_all(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, list[str]]]
) -> None:
    output = tmp_path / "out"
    methods = ["sleb", "sleb:tokens=128", "sleb:refit=down,tokens=128"]
    words = arguments(home, "--output", output, "--depths", 5, "--methods", *methods)
    assert compared(monkeypatch, *words, "--", "--refit", "none") == 0
    rows = table(output)
    assert [row["calibration_tokens"] for row in rows] == ["256", "128", "128"]
    assert [read_run(Path(row["run"]))["refit"]["parts"] for row in rows] == ["none", "none", "down"]
    assert len({row["run"] for row in rows}) == 3
    assert "Calibrated on 128 to 256 tokens" in (output / "comparison.md").read_text()


def test_same_ground() -> None:
    def row(model: str, data: str, **options: str) -> dict[str, Any]:
        return {"status": "finished", "options": options, "fingerprints": [model, data]}

    rows = [row("m", "a"), row("m", "a"), row("m", "b"), row("m", "c", tokens="8"), row("n", "c", tokens="8")]
    _same_ground(rows)
    assert [found["status"] for found in rows] == ["finished", "finished", "failed", "finished", "failed"]
    assert "calibration tokens" in rows[2]["error"] and "not the model" in rows[4]["error"]
