"""`come-eval` on tiny models: perplexity by hand, tasks against lm-eval itself, the cache, bad input."""

from __future__ import annotations

import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import exit_code, is_one_line
from conftest import save_tiny, tiny_ids, tiny_model, tiny_text, tiny_tokenizer
from questions import questions

from come_pl import locks, models
from come_pl.cli.evaluate import evaluate_main
from come_pl.evaluation import zeroshot
from come_pl.evaluation.perplexity import BadWindows, perplexity, strided
from come_pl.runs import Run
from come_pl.workflows import evaluate as workflow
from come_pl.workflows.evaluate import average


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, a run folder that came from it, a text and tasks."""
    folder = tmp_path_factory.mktemp("evaluation")
    dense = save_tiny(folder / "dense", layers=4)
    made = Run(folder / "run", {})
    save_tiny(folder / "run" / "model", layers=3, seed=2)
    made.update(model={"path": dense, "layers": 4}, status="finished")
    tiny_text(folder / "text.txt")
    questions(folder)
    tagged = (folder / "tasks" / "a.yaml").read_text().replace("task: tiny_choice", "task: tiny_tagged\ntag: tiny_tag")
    (folder / "tasks" / "d.yaml").write_text(tagged)
    return folder


def evaluated(monkeypatch: pytest.MonkeyPatch, home: Path, *words: object) -> int:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    return exit_code(evaluate_main, "come-eval", *words, monkeypatch=monkeypatch)


SMALL = ("--texts", "text.txt", "--tokens", 256, "--seqlen", 16, "--include_path", "tasks", "--device", "cpu")


# -- perplexity -------------------------------------------------------------------------------------------------------


def test_strided_windows_count_every_token_once() -> None:
    stream = torch.arange(100, 141)
    for seqlen, stride, first in ((8, 3, None), (8, 7, 0), (8, 8, None), (64, 5, None), (41, 1, None)):
        ids, mask, counted = strided(stream, seqlen, stride, first)
        assert ids[counted].tolist() == stream.tolist() and not (counted & ~mask).any()
        if first is not None:
            assert (ids[:, 0] == first).all() and mask[:, 0].all() and not counted[:, 0].any()
        body = ids[:, first is not None :]
        for row in range(len(ids)):
            assert body[row, 0] == 100 + row * stride
    with pytest.raises(BadWindows, match="stride 8: expected from 1 to 7"):
        strided(stream, 8, 8, 0)


@pytest.mark.parametrize("first", [None, 0])
def test_strided_perplexity_and_divergence_by_hand(first: int | None) -> None:
    model, dense = tiny_model(seed=1), tiny_model(seed=2)
    stream = tiny_ids(1, 30)[0]
    found = perplexity(model, *strided(stream, 10, 4, first)[:2], counted=strided(stream, 10, 4, first)[2], dense=dense)
    body, nats, kl, count, done = 10 - (first is not None), 0.0, 0.0, 0, 0
    for begin in range(0, 30, 4):
        end = min(begin + body, 30)
        head = [] if first is None else [first]
        ids = torch.tensor([head + stream[begin:end].tolist()])
        with torch.no_grad():
            mine, theirs = (m(ids).logits[0].log_softmax(-1) for m in (model, dense))
        for position in range(max(done, begin), end):
            at = position - begin + len(head)
            if at:
                nats -= float(mine[at - 1, ids[0, at]])
                kl += float((theirs[at - 1].exp() * (theirs[at - 1] - mine[at - 1])).sum())
                count += 1
        done = end
        if end == 30:
            break
    assert found.tokens == count == 30 - (first is None)
    assert found.nats == pytest.approx(nats / count, rel=1e-5) and found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.word(60, 20) == pytest.approx(math.exp(3 * found.nats))
    assert perplexity(model, *strided(stream, 10, 4, first)[:2], dense=model).kl == pytest.approx(0, abs=1e-6)


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_lm_eval(home: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    tasks = [zeroshot.TaskName("tiny_choice", 2), zeroshot.TaskName("tiny_group", 0)]
    runner = zeroshot.TaskRunner(tasks, home / "tasks")
    model, tokenizer = models.load_model(str(home / "dense"), "float32"), models.load_tokenizer(str(home / "dense"))
    for task in tasks:
        theirs: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={home / 'dense'},dtype=float32",
            tasks=[task.name],
            num_fewshot=task.shots,
            limit=7,
            device="cpu",
            task_manager=manager,
        )
        score = runner.score(model, tokenizer, task, limit=7)
        metric = "acc" if task.name == "tiny_group" else "acc_norm"
        entry = theirs["results"][task.name]
        assert score.metric == metric and score.score == entry[f"{metric},none"]
        assert score.stderr == pytest.approx(entry[f"{metric}_stderr,none"])
        assert score.samples == (14 if task.name == "tiny_group" else 7)


def test_a_group_that_names_a_task_of_lm_eval(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(home / "tasks", folder)
    (folder / "outer.yaml").write_text("group: outer\ntask: [tiny_choice, {group: inner}]\n")
    (folder / "inner.yaml").write_text("group: inner\ntask:\n  - task: arc_easy\n    num_fewshot: 1\n")
    for name, all_of_them in (("tiny_group", False), ("outer", True)):
        runner = zeroshot.TaskRunner([zeroshot.TaskName(name, 0)], folder)
        assert runner.local == {name} and ("arc_easy" in runner.manager.all_tasks) == all_of_them


def test_a_broken_task_ends_no_other(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(home / "tasks", home / "broken")
    source = (home / "tasks" / "a.yaml").read_text()
    wrong = {"undefined": source.replace("{{question}}", "{{nobody.knows}}"), "typed": source.replace("choices", "7()")}
    for name, text in wrong.items():
        (home / "broken" / f"{name}.yaml").write_text(text.replace("tiny_choice", name))
    words = ("dense", *SMALL[:-4], "--include_path", "broken", "--device", "cpu", "--limit", 3)
    words += ("--texts", "none", "--tasks", *wrong, "mmlu_tiny", "--output", "broken.json")
    assert evaluated(monkeypatch, home, *words) == 1
    info = json.loads((home / "broken.json").read_text())
    assert list(info["tasks"]) == ["mmlu_tiny"] and list(info["failed"]) == list(wrong)
    assert "UndefinedError" in info["failed"]["undefined"] and "TypeError" in info["failed"]["typed"]
    assert capsys.readouterr().err.count("failed: task '") == 2


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.txt", "more/rows.jsonl"])
def test_a_task_is_known_by_its_data_too(home: Path, tmp_path: Path, name: str) -> None:
    folder, task = tmp_path / "tasks", zeroshot.TaskName("tiny_choice", 0)
    shutil.copytree(home / "tasks", folder)

    def identity() -> dict[str, Any]:
        return zeroshot.TaskRunner([task], folder).identity(task)

    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("a")
    before = identity()
    for kept in ("__pycache__", ".cache"):
        (folder / kept).mkdir()
        (folder / kept / "file").write_text("of no influence")
    assert identity() == before
    (folder / name).write_text("b")
    assert identity() != before


def test_how_tasks_are_named() -> None:
    assert [zeroshot.read_task(t).shots for t in ("piqa", "mmlu", "mmlu_offline", "piqa=3", "mmlu=0")] == [
        0,
        5,
        5,
        3,
        0,
    ]
    for wrong in ("piqa=x", "=3", ""):
        with pytest.raises(zeroshot.TaskError, match="expected NAME or NAME=SHOTS"):
            zeroshot.read_task(wrong)


def test_average() -> None:
    scores = {"a": {"model": {"score": 0.5, "stderr": 0.03}, "dense": {"score": 0.75, "stderr": 0.0}}}
    scores["b"] = {"model": {"score": 0.25, "stderr": 0.04}, "dense": {"score": 0.25, "stderr": None}}
    found = average(scores)
    assert found["model"] == {"score": 0.375, "stderr": 0.025} and found["kept"] == 0.75 and found["tasks"] == 2


# -- the command ------------------------------------------------------------------------------------------------------


def test_run_next_to_dense_then_again_from_the_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("run", "--dense", "auto", *SMALL, "--tasks", "tiny_choice", "tiny_lost", "mmlu_tiny", "--limit", 6)
    assert evaluated(monkeypatch, home, *words) == 1  # one task has no data; the others are there
    info = json.loads((home / "run" / "eval.json").read_text())
    assert info["model"]["layers"] == 3 and info["dense"]["layers"] == 4
    assert list(info["tasks"]) == ["tiny_choice", "mmlu_tiny"] and "tiny_lost" in info["failed"]
    assert info["tasks"]["tiny_choice"]["shots"] == 0 and info["tasks"]["mmlu_tiny"]["shots"] == 5
    assert info["tasks"]["tiny_choice"]["model"]["metric"] == "acc_norm"
    assert info["tasks"]["tiny_choice"]["model"]["samples"] == 6
    entry = info["perplexity"]["text.txt"]
    ids = torch.tensor(tiny_tokenizer()((home / "text.txt").read_text()).input_ids[:256]).view(-1, 16)
    from transformers import AutoModelForCausalLM

    for which, path in (("model", "run/model"), ("dense", "dense")):
        with torch.no_grad():
            nats = AutoModelForCausalLM.from_pretrained(home / path)(ids, labels=ids).loss.item()
        assert entry[which]["token"] == pytest.approx(math.exp(nats), rel=1e-4)
        assert entry[which]["words"] == 256 and entry[which]["word"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert entry["model"]["kl"] > 0 and entry["dense"]["kl"] is None
    assert entry["quality_kept"] == pytest.approx(entry["dense"]["token"] / entry["model"]["token"], abs=1e-4)
    page = (home / "run" / "eval.md").read_text()
    assert "| tiny_choice | 0 | acc_norm | 6 |" in page and "| average |" in page and "Failed: " in page

    asked: list[str] = []
    monkeypatch.setattr(
        workflow, "_score_of", lambda runner, model, tokenizer, task, **_: asked.append(task.name) or {}
    )
    monkeypatch.setattr(workflow, "_perplexity", lambda *_, **__: pytest.fail("it is in the cache"))
    (home / "run" / "eval.json").unlink()
    words = tuple(w for w in words if w != "tiny_lost")
    assert evaluated(monkeypatch, home, *words) == 0 and not asked
    again = json.loads((home / "run" / "eval.json").read_text())
    assert again["tasks"] == info["tasks"] and again["perplexity"] == info["perplexity"]
    with pytest.raises(KeyError):  # the stand-in has no score: other limit, other result
        evaluated(monkeypatch, home, *words[:-1], 5)
    assert asked == ["tiny_choice"] * 2


class Killed(BaseException):
    """What no code of the package catches."""


def test_killed_between_tasks_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = workflow._score_of
    asked: list[str] = []

    def score(runner: Any, model: Any, tokenizer: Any, task: Any, **options: Any) -> dict[str, Any]:
        asked.append(task.name)
        if asked == ["tiny_choice", "mmlu_tiny"]:
            raise Killed
        return real(runner, model, tokenizer, task, **options)

    monkeypatch.setattr(workflow, "_score_of", score)
    words = ("dense", *SMALL, "--tasks", "tiny_choice", "mmlu_tiny", "--limit", 3, "--output", "out/dense.json")
    with pytest.raises(Killed):
        evaluated(monkeypatch, home, *words)
    assert list(json.loads((home / "out/dense.json").read_text())["tasks"]) == ["tiny_choice"]
    assert evaluated(monkeypatch, home, *words) == 0
    assert asked == ["tiny_choice", "mmlu_tiny", "mmlu_tiny"]
    info = json.loads((home / "out/dense.json").read_text())
    assert list(info["tasks"]) == ["tiny_choice", "mmlu_tiny"] and "dense" not in info
    assert info["perplexity"]["text.txt"]["model"]["kl"] is None


def test_bos_and_strides(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(home / "gemma", "gemma")
    words = ("gemma", *SMALL, "--tasks", "none", "--stride", 5, "--output", "gemma.json", "--cache", "elsewhere")
    assert evaluated(monkeypatch, home, *words) == 0
    info = json.loads((home / "gemma.json").read_text())
    assert info["settings"]["bos"] and info["perplexity"]["text.txt"]["model"]["tokens"] == 256
    assert not info["tasks"] and "average" not in info and list((home / "elsewhere").glob("*.json"))
    assert "strided by 5, each begun with BOS" in (home / "gemma.md").read_text()


def test_a_second_call_adds_to_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny_text(home / "other.txt", seed=3)
    file = home / "both" / "eval.json"

    def call(*words: object, model: str = "run") -> dict[str, Any]:
        capsys.readouterr()
        assert evaluated(monkeypatch, home, model, *SMALL, "--output", file, *words) == 0
        return json.loads(file.read_text())

    first = call("--tasks", "tiny_choice", "--limit", 6)
    second = call("--texts", "none", "--tasks", "mmlu_tiny=1", "--limit", 3)
    assert second["perplexity"] == first["perplexity"] and second["settings"]["seqlen"] == 16
    assert second["tasks"]["tiny_choice"] == first["tasks"]["tiny_choice"]
    assert {name: task["limit"] for name, task in second["tasks"].items()} == {"tiny_choice": 6, "mmlu_tiny": 3}
    assert second["average"]["tasks"] == 2
    third = call("--texts", "other.txt", "--tasks", "none")
    assert list(third["perplexity"]) == ["text.txt", "other.txt"] and third["tasks"] == second["tasks"]
    assert third["versions"]["lm_eval"] and third["average"] == second["average"]
    assert "replaced" not in capsys.readouterr().out
    page = file.with_suffix(".md").read_text()
    assert all(name in page for name in ("text.txt", "other.txt", "tiny_choice", "mmlu_tiny", "average"))
    again = call("--tasks", "tiny_choice", "--texts", "none", "--limit", 2)["tasks"]
    assert again["tiny_choice"]["model"]["samples"] == 2 and again["mmlu_tiny"] == second["tasks"]["mmlu_tiny"]

    other = call("--tasks", "none", "--seqlen", 8)
    assert list(other["perplexity"]) == ["text.txt"] and other["tasks"] == again
    assert "eval.json: perplexity measured with seqlen 16 is replaced\n" in capsys.readouterr().out
    new = call("--tasks", "none", model="dense")
    assert list(new["perplexity"]) == ["text.txt"] and not new["tasks"] and "average" not in new
    assert "eval.json: replaced, as it was of another model" in capsys.readouterr().out


def test_calls_that_overlap_keep_each_others_results(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_text(home / "third.txt", seed=4)
    words = ("dense", *SMALL[2:], "--limit", 3, "--output", "overlap.json", "--cache", "overlapping")
    real, inner = workflow._score_of, [("--texts", "third.txt", "--tasks", "mmlu_tiny")]

    def score(*arguments: Any, **options: Any) -> dict[str, Any]:
        if inner:
            assert evaluated(monkeypatch, home, *words, *inner.pop()) == 0
        return real(*arguments, **options)

    monkeypatch.setattr(workflow, "_score_of", score)
    assert evaluated(monkeypatch, home, *words, "--texts", "text.txt", "--tasks", "tiny_choice") == 0
    info = json.loads((home / "overlap.json").read_text())
    assert set(info["perplexity"]) == {"text.txt", "third.txt"} and set(info["tasks"]) == {"tiny_choice", "mmlu_tiny"}
    assert info["average"] == average(info["tasks"])
    assert not list(home.glob(".overlap*"))


@pytest.mark.skipif(not locks.KNOWN, reason="no locks on this system")
def test_only_one_call_writes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []

    def alone(number: int) -> None:
        with workflow._alone(tmp_path / "eval.json"):
            inside.append(number)
            time.sleep(0.01)
            inside.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(alone, range(24)))
    assert inside[::2] == inside[1::2] and sorted(inside[::2]) == list(range(24)) and not list(tmp_path.iterdir())


def test_both_are_measured_in_the_dense_models_dtype(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(home / "half")
    real = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, dtype, accelerated: real(name, dtype, accelerated=True))
    for dense, expected in (("half", "bfloat16"), ("none", "float32")):
        words = ("dense", *(("--dense", dense) if dense != "none" else ()), *SMALL, "--tasks", "none")
        assert evaluated(monkeypatch, home, *words, "--output", f"{dense}.json") == 0
        info = json.loads((home / f"{dense}.json").read_text())
        assert {info[which]["dtype"] for which in ("model", "dense") if which in info} == {expected}


def test_a_file_that_is_no_result_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in ("", "[]", '{"model": {}}', '{"perplexity": 1, "settings": [], "tasks": {}}'):
        (home / "junk.json").write_text(content)
        assert evaluated(monkeypatch, home, "dense", *SMALL, "--tasks", "none", "--output", "junk.json") == 0
        assert json.loads((home / "junk.json").read_text())["perplexity"]["text.txt"]


def test_the_model_is_looked_for_before_lm_eval_is_read(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(workflow, "TaskRunner", lambda *_: pytest.fail("slow"))
    assert evaluated(monkeypatch, home, "./nope") == 2
    assert is_one_line(capsys.readouterr().err, "model path './nope' does not exist")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing-here/"], "nothing-here"),
        (["dense", "--dense", "auto"], "give --dense PATH"),
        (["dense", "--tasks", "tiny_choise"], "did you mean 'tiny_choice'?"),
        (["dense", "--tasks", "tiny_choice=many"], "expected NAME or NAME=SHOTS"),
        (["dense", "--include_path", "nowhere"], "include_path 'nowhere' is no folder"),
        (["dense", "--limit", "0"], "limit 0: expected at least 1"),
        (["dense", "--stride", "99"], "stride 99: expected from 1 to 16"),
        (["dense", "--texts", "lost.txt"], "lost.txt"),
        (["dense", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["dense", "--dense", "other"], "expected the model that it was made from"),
        (["empty"], "run folder 'empty' has no model/"),
        (["dense", "--seqlen", "1"], "seqlen is 1: expected at least 2"),
        (["dense", "--dtype", "float7"], "dtype 'float7' is not known"),
        (["dense", "--texts", "none", "--tasks", "none"], "nothing to measure: --texts none and --tasks none"),
        (["small"], "the tokenizer of 'small' makes token"),
        (["dense", "--output", "data"], "output 'data' cannot be written (it is a folder)"),
        (["dense", "--output", "bad.md"], "output 'bad.md' cannot be written (the Markdown goes beside the JSON)"),
        (["dense", "--tasks", "tiny_tag"], "a tag, which has no score of its own; expected tasks or groups, as those"),
        (["dense", "--output", "text.txt/e.json"], "output 'text.txt/e.json' cannot be written ('"),
        (["dense", "--tasks", "tiny_choice", "--output", "text.txt/e.json"], "output 'text.txt/e.json' cannot be"),
        ([], "model"),
    ],
)
def test_bad_input_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], expected: str
) -> None:
    if words[-1:] == ["other"]:
        save_tiny(home / "other", vocab_size=99)
    if words == ["small"]:
        save_tiny(home / "small", vocab_size=50)
    if "--dense" not in words:
        monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model is loaded before"))
    if words == ["empty"]:
        Run(home / "empty", {})
    rest = [word for word in SMALL if word not in ("--device", "cpu")]
    rest += [] if "--tasks" in words else ["--tasks", "tiny_choice"]
    if "--include_path" in words:
        rest = rest[: rest.index("--include_path")] + rest[rest.index("--include_path") + 2 :]
    rest += [] if "--output" in words else ["--output", "bad/eval.json"]
    assert evaluated(monkeypatch, home, *words[:1], *rest, *words[1:]) == 2
    error = capsys.readouterr().err
    assert is_one_line(error, expected)
    assert not (home / "bad").exists()


def test_without_lm_eval(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def absent(name: str) -> str:
        raise zeroshot.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(zeroshot.metadata, "version", absent)
    assert evaluated(monkeypatch, home, "dense", "--output", "bad/eval.json") == 2
    assert "pip install 'come_pl[eval]', or give --tasks none" in capsys.readouterr().err
