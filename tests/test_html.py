"""`report.html`: what it says, that it needs nothing but itself, and how a browser shows it."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, look
from cli import run
from conftest import save_tiny, tiny_model, tiny_text, tiny_tokenizer
from PIL import Image
from test_report import run_file, synthetic, write

from come_pl.cli.report import report_main
from come_pl.evaluation.samples import continuation
from come_pl.report import write_report
from come_pl.report.story import read_story, summary, tiles, won_back
from come_pl.runs import RunError
from come_pl.workflows.report import ask, finish

VOID = {"meta", "img", "br", "hr", "link", "input", "source", "base"}
PERPLEXITY = {"dense": 20.0, "pruned": 180.0, "tokens": 16352, "seqlen": 512}


class Page(HTMLParser):
    """Elements with their attributes, text, and whether every tag that opens also closes."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def pruned(folder: Path, dense: int = 12, final: int = 8, **over: Any) -> Path:
    steps = synthetic(dense, final)
    for step in steps:
        step["scores"]["refit_error"] = [0.6 if i == step["layers"][0] else None for i in range(len(step["groups"]))]
    info = run_file(dense) | {
        "status": "finished",
        "command": "prune.py --target_layers 8",
        "versions": {"torch": "2.13.0"},
        "perplexity": {"/data/held.txt": PERPLEXITY},
        "parameters": {"dense": 1_000_000, "pruned": 750_000, "layer": 62_500},
        "data": {"source": "/data/text.txt", "tokens": 4096, "seqlen": 512},
        "groups": steps[-1]["groups"],
        "seconds": {"prune": 12.5},
        "seed": 7,
    }
    return write(folder, steps, info | over)


def distilled(folder: Path, parent: Path, **over: Any) -> Path:
    info = json.loads((parent / "run.json").read_text())
    entry = {"dense": 20.0, "before": 180.0, "after": 60.0, "tokens": 16352, "seqlen": 512}
    info |= {
        "student": {"run": str(parent), "groups": info["groups"]},
        "method": {"name": "mp", "loss": "mse"},
        "perplexity": {"/data/held.txt": entry},
        "command": "train.py --student run",
        "tokens_seen": 49152,
        "tokens_per_second": 600.0,
        "trained_parameters": 200_000,
        "parameters": 750_000,
        "seconds": 80.0,
    }
    write(folder, synthetic(12, 8), info | over)
    rows = [f"{n},{n * 2048},{n},{0.6 / n},{0.4 / n},{0.2 / n}" for n in range(1, 25)]
    (folder / "curves.csv").write_text("step,tokens,seconds,loss,layer 5,layer 6\n" + "\n".join(rows) + "\n")
    (folder / "validation.csv").write_text("step,val_loss\n12,0.3\n24,0.2\n")
    return folder


def measured(folder: Path) -> Path:
    """Adds what come-eval, come-latency and the models' own words leave in a run folder."""

    def spread(middle: float) -> dict[str, float]:
        return {"median": middle, "low": 0.95 * middle, "high": 1.1 * middle}

    def timed(factor: float) -> dict[str, Any]:
        parts = {"prompt_seconds": spread(0.3 * factor), "generation_seconds": spread(4.0 * factor)}
        speeds = {"prompt_tokens_per_second": 1700 / factor, "generation_tokens_per_second": 16 / factor}
        return parts | speeds | {"peak_gib": 0.7 * factor, "turns": 7}

    one = {"path": "x", "fingerprint": "f", "parameters": 1, "dtype": "float32"}
    gain = {"prompt": spread(1.4), "generation": spread(1.25)}
    load = {"batch": 1, "prompt": 512, "new_tokens": 64, "dense": timed(1), "model": timed(0.8), "speed_up": gain}
    latency = {
        "dense": one | {"layers": 12},
        "model": one | {"layers": 8},
        "settings": {"repeats": 7, "warmup": 2, "compile": False},
        "machine": {"device": "x86_64", "threads": 2},
        "results": [load],
        "ideal": {"layers": 1.5, "with_head": 1.3, "layers_share": 0.8},
    }
    (folder / "latency.json").write_text(json.dumps(latency))
    score = {"metric": "acc_norm", "score": 0.4, "stderr": 0.05, "samples": 100}
    tasks = {"arc_easy": {"shots": 0, "model": score, "dense": score | {"score": 0.5}, "kept": 0.8}}
    average = {
        "tasks": 1,
        "model": {"score": 0.4, "stderr": 0.05},
        "dense": {"score": 0.5, "stderr": 0.05},
        "kept": 0.8,
    }
    text = {"token": 60.0, "tokens": 16352, "kl": 0.9, "word": 300.0}
    perplexity = {"held": {"model": text, "dense": text | {"kl": None}, "quality_kept": 0.33}}
    (folder / "eval.json").write_text(json.dumps({"perplexity": perplexity, "tasks": tasks, "average": average}))
    words = {stage: [f"{stage} says <b>this</b> & more"] for stage in ("dense", "pruned", "recovered")}
    (folder / "samples.json").write_text(json.dumps({"prompts": ["Once upon"], "new_tokens": 24} | words))
    return folder


def comparison(folder: Path, methods: tuple[str, ...] = ("come", "sleb", "laco")) -> Path:
    common = {"text": "embedded", "status": "finished", "peak_gib": 2.0, "calibration_tokens": 4096, "dense": 13.0}
    rows: list[dict[str, Any]] = []
    for index, method in enumerate(methods):
        for layers, factor in ((10, 1.5), (8, 3.0 + index)):
            cost = {"times_dense": factor, "perplexity": 13 * factor, "quality_kept": 1 / factor}
            rows.append(common | cost | {"method": method, "layers": layers, "seconds": 50.0 / (index + 1), "run": "r"})
            rows[-1]["evaluation_tokens"] = 4096
    rows.append({"method": "mka", "layers": 8, "text": "embedded", "status": "failed", "error": "no <memory>"})
    settings = {"model": "m", "layers": 12, "calibration": "embedded", "tokens": 4096, "seqlen": 512, "seed": 0}
    settings |= {"evaluation": ["embedded"], "passed": [], "command": "come-compare --depths 10 8"}
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = {"pruned": pruned(folder / "prune" / "p"), "compared": comparison(folder / "c")}
    found["full"] = measured(distilled(folder / "distill" / "d", found["pruned"]))
    for name in list(found):
        write_report([found[name]])
    found["all"] = folder / "all"
    write_report([found["pruned"], found["full"], found["compared"]], found["all"])
    return found


@pytest.mark.parametrize("name", ["pruned", "full", "compared", "all"])
def test_a_page_is_whole_and_needs_nothing_else(runs: dict[str, Path], name: str) -> None:
    page = Page(runs[name] / "report.html")
    loaded = [v for _, a in page.elements for k, v in a.items() if k in ("src", "href", "srcset", "data", "poster")]
    assert loaded and all(value.startswith(("data:image/png;base64,", "#")) for value in loaded)
    assert not [a["style"] for _, a in page.elements if re.search(r"url|//", a.get("style", ""))]
    assert not re.search(r"url\(|@import|https?://", page.source.partition("<body>")[0])
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy and "script-src" not in policy
    assert any(a.get("name") == "viewport" for a in page.all("meta")) and page.all("html") == [{"lang": "en"}]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"] for a in page.all("a")} <= {f"#{i}" for i in ids}
    images, files = page.all("img"), sorted(runs[name].glob("*.png"))
    assert len(images) == len(files) >= 2
    embedded = {base64.b64decode(a["src"].removeprefix("data:image/png;base64,")): a for a in images}
    for file in files:
        with Image.open(file) as image:
            title, words = image.info["Title"], image.info["Description"]
        assert embedded[file.read_bytes()]["alt"] == words and words.startswith(title) and len(title) > 20


def test_what_it_says_of_a_recovered_run(runs: dict[str, Path]) -> None:
    story = read_story(runs["full"])
    said = summary(story)
    assert said == (
        "4 of 12 layers were removed by merging neighbours (CoMe), which took perplexity from 20.00 to 180.0 (9.00×); "
        "training on 49,152 tokens (CoMe-mp) brought it to 60.00 (3.00×)."
    )
    assert won_back(PERPLEXITY | {"recovered": 60.0}) == pytest.approx(0.5)  # 180 → 60 → 20: half of two factors of 3
    values = {tile.heading: tile.value for tile in tiles(story)}
    assert values == {
        "Removed": "4 of 12 layers",
        "What it cost": "9.00× perplexity",
        "Won back": "50% of the damage",
        "Gained": "1.25× as fast",
        "Tasks": "80% kept",
    }
    page = Page(runs["full"] / "report.html")
    for words in (
        said,
        "prune.py --target_layers 8",
        "train.py --student run",
        "−25%",
        "arc_easy",
        "40.0 ± 5.0",
        "seed",
    ):
        assert words in page.text, words
    assert "recovered says <b>this</b> & more" in page.text  # as text, not as a tag
    assert "Repair in closed form took away 40%" in page.source
    assert "Every loss fell" in page.source and "Writing is 1.25× as fast" in page.source
    assert "the ideal is 1.50× (12 layers → 8)" in page.source


def test_sections_are_there_only_with_their_data(runs: dict[str, Path], tmp_path: Path) -> None:
    def sections(folder: Path) -> list[str]:
        return [a["id"] for a in Page(folder / "report.html").all("section") if "id" in a]

    assert sections(runs["pruned"]) == ["layers", "steps", "repair", "quality", "provenance"]
    assert sections(runs["full"]) == [
        *("layers", "steps", "repair", "training", "texts", "speed", "quality", "provenance")
    ]
    assert sections(runs["compared"]) == ["methods", "quality", "provenance"]
    assert [s for s in sections(runs["all"]) if s.endswith("layers")] == ["1-d-layers"]  # the pruning is told with it
    bare = write(tmp_path / "bare", [], {"status": "running", "model": {"path": "m", "layers": 4}})
    page = Page(write_report([bare]))
    assert sections(bare) == ["provenance"] and not page.all("img")
    assert "not finished: so far 0 of 4 layers" in page.text
    lonely = distilled(tmp_path / "lonely", runs["pruned"], student={"run": "gone", "groups": [[0, 1]]})
    assert "by merging neighbours, which took" in Page(write_report([lonely])).text


def test_a_training_without_validation(tmp_path: Path) -> None:
    folder = distilled(tmp_path / "d", pruned(tmp_path / "p"))
    (folder / "validation.csv").unlink()
    write_report([folder])
    with Image.open(folder / "distill.png") as image:
        assert "Held-out" not in image.info["Description"]


def test_the_repair_that_ran_is_told(tmp_path: Path) -> None:
    refit = {"parts": "both", "when": "end", "sweep": 0, "channels": "group", "final": True, "last": 3}
    text = Page(write_report([pruned(tmp_path / "p", refit=refit)])).text
    assert "output projections of attention and MLP were solved for" in text and "(3 at most)" in text
    assert "After a step" not in text


def test_drops_and_perplexity_that_is_not_finite(tmp_path: Path) -> None:
    steps = synthetic(6, 4, "drop")
    entry = {"dense": 20.0, "pruned": float("inf"), "tokens": 64, "seqlen": 16}
    folder = write(tmp_path / "run", steps, run_file(6, "sleb") | {"status": "finished", "perplexity": {"t": entry}})
    page = Page(write_report([folder]))
    assert "2 of 6 layers were removed by dropping them (sleb)" in page.text
    assert [a["class"] for a in page.all("li") if "class" in a].count("dropped") == 2
    assert "Struck through" in page.text


def test_what_is_read_is_never_markup(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=http://x.y/z>'
    folder = pruned(tmp_path / "run", command=evil, method={"name": evil}, versions={evil: evil})
    info = json.loads((folder / "run.json").read_text())
    info["model"]["path"] = info["data"]["source"] = evil
    info["perplexity"] = {evil: PERPLEXITY}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "samples.json").write_text(json.dumps({"prompts": [evil], "new_tokens": 1, "dense": [evil]}))
    page = Page(write_report([folder]))
    assert not page.all("script") and all(a["src"].startswith("data:image/png") for a in page.all("img"))
    assert page.text.count(evil) >= 3


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "does not exist; expected a run folder"),
        ({}, "has neither run.json nor comparison.json; expected a run folder"),
        ({"run.json": "{"}, "is damaged"),
        ({"run.json": "{}", "record.jsonl": "nonsense"}, "record.jsonl' is damaged"),
        ({"run.json": "{}", "eval.json": "nonsense"}, "eval.json' is damaged"),
        ({"comparison.json": "{}"}, "cannot be reported: its files lack 'rows'"),
        ({"run.json": "{}", "record.jsonl": '{"kind": "drop"}'}, "cannot be reported: its files lack"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    made: dict[str, str] | None,
    said: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    if made is not None:
        folder.mkdir()
        for name, content in made.items():
            (folder / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["come-report", str(folder)])
    with pytest.raises(SystemExit) as stop:
        report_main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in error and len(error.splitlines()) == 1 and str(folder) in error
    assert not (folder / "report.html").exists()


def test_a_failure_to_draw_or_to_speak_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = pruned(tmp_path / "run")
    (folder / "record.jsonl").write_text('{"step": 1, "kind": "merge", "layers": [40, 41], "groups": [[0]]}\n')

    def speak() -> None:
        raise MemoryError("not enough for a word")

    finish(folder, speak)
    errors = capsys.readouterr().err
    assert "no samples.json (not enough for a word)" in errors and "no report.html (step 1" in errors
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "qwen2-window"])
def test_continuations_are_those_of_transformers(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    prompt = "w1 w20 w33 w4 w9 w11"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    whole = model.generate(ids, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = tokenizer.decode(whole[0, ids.shape[1] :])
    assert continuation(model, tokenizer, prompt, 10).strip() == expected.strip()
    words = expected.split()
    model.config.eos_token_id = [int(whole[0, ids.shape[1] + 3])]
    assert continuation(model, tokenizer, prompt, 10).split() == words[: words.index(words[3])]
    model.config.eos_token_id = None
    longest = " ".join(["w1"] * 62)  # of 64 positions
    assert len(continuation(model, tokenizer, longest, 10).split()) == 2


def test_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ask(tmp_path / "a", {"dense": lambda: model, "pruned": lambda: model}, tokenizer, ["w1 w2"], 3)
    ask(tmp_path / "b", {"recovered": lambda: model}, tokenizer, ["w1 w2"], 3, known=tmp_path / "a")
    found = json.loads((tmp_path / "b" / "samples.json").read_text())
    assert found["dense"] == found["pruned"] == found["recovered"] and len(found["recovered"]) == 1
    ask(tmp_path / "b", {"recovered": lambda: model}, tokenizer, ["w1 w2"], 4, known=tmp_path / "a")
    assert "dense" not in json.loads((tmp_path / "b" / "samples.json").read_text())  # other lengths: not comparable


def test_prune_and_train_leave_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = save_tiny(tmp_path / "model"), tiny_text(tmp_path / "text.txt", words=4000)
    small = ["--evaluation.data", text, "--evaluation.tokens", 128, "--data.seqlen", 16]
    done = run(
        *("prune.py", "--model.path", model, "--data.calibration", text, "--data.tokens", 128, "--target_layers", 3),
        *(*small, "--output", tmp_path / "p"),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    done = run(
        *("train.py", "--student", tmp_path / "p", "--data.source", text, "--data.tokens", 256, "--data.batch_size", 2),
        *(*small, "--data.validation_tokens", 32, "--trainer.accelerator", "cpu", "--output", tmp_path / "t"),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    first, second = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("p", "t"))
    assert second["dense"] == first["dense"] and second["pruned"] == first["pruned"] and second["recovered"]
    assert "1 of 4 layers was removed" in Page(tmp_path / "p" / "report.html").text
    page = Page(tmp_path / "t" / "report.html")
    assert (
        "CoMe-hybrid" in page.text and "In their own words" in page.text and (tmp_path / "t" / "distill.png").is_file()
    )
    monkeypatch.setattr(
        sys, "argv", ["come-report", "--samples", str(tmp_path / "t"), "--new_tokens", "2", "--prompts", "w1 w2", "w3"]
    )
    report_main()
    again = json.loads((tmp_path / "t" / "samples.json").read_text())
    assert again["prompts"] == ["w1 w2", "w3"] and {"dense", "pruned", "recovered"} <= again.keys()
    with pytest.raises(RunError, match="no run given"):
        write_report([])


browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH (Debian: apt-get install chromium)")


@browser
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["pruned", "full", "compared", "all"])
def test_in_a_browser(runs: dict[str, Path], name: str, width: int, tmp_path: Path) -> None:
    seen = look(runs[name] / "report.html", width, tmp_path)
    assert seen["width"] == width and seen["needed"] <= width, seen["outside"]
    assert not seen["outside"] and not seen["cut"]
    assert seen["images"] and all(seen["images"]) and seen["text"] > 500
    assert not seen["console"] and not seen["requests"] and not seen["resources"]


@browser
def test_light_and_dark(runs: dict[str, Path], tmp_path: Path) -> None:
    light, dark = (look(runs["full"] / "report.html", 400, tmp_path, dark=dark) for dark in (False, True))

    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765

    assert brightness(light["background"]) > 0.9 and brightness(light["ink"]) < 0.2
    assert brightness(dark["background"]) < 0.1 and brightness(dark["ink"]) > 0.8


@browser
def test_the_browser_test_would_notice(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!DOCTYPE html><body><img src="http://example.invalid/x.png"><div style="width: 900px">wide</div>'
        '<p style="overflow: hidden; height: 4px">cut</p><script>console.error("oh")</script></body>'
    )
    seen = look(bad, 400, tmp_path)
    assert seen["needed"] > 400 and seen["outside"] and seen["cut"] and seen["console"]
    assert "http://example.invalid/x.png" in seen["requests"] and not all(seen["images"])
