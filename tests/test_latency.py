"""`come-latency` on tiny models: who runs how often and in which order, what is written; never how fast it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import exit_code, is_one_line
from conftest import FAMILIES, save_tiny, tiny_model

from come_pl import models
from come_pl.cli.latency import latency_main
from come_pl.evaluation import latency
from come_pl.evaluation.latency import LatencyError, Load, Turns, ideal, speed_up, spread, summary, take_turns
from come_pl.runs import Run


class Watched(torch.nn.Module):
    """A model that writes down what it is called with."""

    def __init__(self, name: str, model: Any, calls: list[tuple[str, int, int]]):
        super().__init__()
        self.inner, self.name, self.calls = model, name, calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        past = options.get("past_key_values")
        self.calls.append((self.name, input_ids.shape[1], 0 if past is None else past.get_seq_length()))
        return self.inner(input_ids=input_ids, **options)


def test_models_take_turns_and_the_cache_grows() -> None:
    calls: list[tuple[str, int, int]] = []
    both = {name: Watched(name, tiny_model(layers=n), calls) for name, n in (("dense", 4), ("model", 3))}
    found = take_turns(both, Load(batch=2, prompt=6, new_tokens=3), repeats=3, warmup=1)
    assert [len(turns.prompt) for turns in found.values()] == [3, 3] == [len(t.generation) for t in found.values()]
    one = [(6, 0), (1, 6), (1, 7), (1, 8)]
    assert [call[1:] for call in calls] == one * 8
    assert [call[0] for call in calls[::4]] == [
        "model",
        "dense",
        *["dense", "model", "model", "dense"],
        "dense",
        "model",
    ]
    assert all(t.peak_gib > 0 and min(*t.prompt, *t.generation) > 0 for t in found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_is_what_transformers_generates(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    calls: list[torch.Tensor] = []

    def watched(**given: Any) -> Any:
        calls.append(given["input_ids"])
        return model(**given)

    latency._turn(watched, tokens, 5)
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert torch.equal(torch.cat(calls, 1), expected)


def test_numbers_by_hand() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    dense, pruned = Turns([2.0, 3.0, 9.0], [4.0, 4.0, 4.0], 1.0), Turns([1.0, 2.0, 3.0], [2.0, 2.0, 1.0], 0.5)
    gains = speed_up(dense, pruned)
    assert gains["prompt"]["median"] == 2.0 and gains["generation"] == {"median": 2.0, "low": 2.0, "high": 3.0}
    told = summary(dense, Load(batch=2, prompt=6, new_tokens=8))
    assert told["prompt_tokens_per_second"] == 4.0 and told["generation_tokens_per_second"] == 4.0
    assert told["peak_gib"] == 1.0 and told["turns"] == 3
    both = [tiny_model(layers=n) for n in (4, 3)]
    layer, head = sum(p.numel() for p in both[0].model.layers[0].parameters()), 97 * 32
    best = ideal(*both)
    assert best["layers"] == pytest.approx(4 / 3)
    assert best["with_head"] == pytest.approx((4 * layer + head) / (3 * layer + head))
    assert best["layers_share"] == pytest.approx(4 * layer / (4 * layer + head))


def test_compiled_models_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(torch, "compile", lambda model: Watched("compiled", model, calls))
    take_turns({"model": tiny_model()}, Load(prompt=4, new_tokens=2), repeats=1, warmup=1, compiled=True)
    assert len(calls) == 6

    def broken(model: Any) -> Any:
        def forward(**_: Any) -> Any:
            raise RuntimeError("no working C++ compiler\nmore")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(LatencyError, match="torch.compile failed .no working C.. compiler.; measure without"):
        take_turns({"model": tiny_model()}, Load(prompt=4, new_tokens=2), compiled=True)


def test_every_forward_of_every_load_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*given: Any) -> Any:
            ran.append(len(given))
            return graph.forward(*given)

        return run

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=counting, dynamic=False))
    both = {name: tiny_model(layers=n) for name, n in (("dense", 4), ("model", 3))}
    for batch in (1, 2):
        for prompt in (4, 6, 8, 10):
            ran.clear()
            take_turns(both, Load(batch, prompt, new_tokens=2), repeats=1, warmup=1, compiled=True)
            assert len(ran) >= 2 * 2 * 3, (batch, prompt)

    monkeypatch.setattr(latency, "GRAPHS", 2)
    with pytest.raises(LatencyError, match="made 2 graphs of one function .* measure without --compile"):
        take_turns(both, Load(1, 4, new_tokens=6), repeats=1, warmup=1, compiled=True)
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latency")
    dense = save_tiny(folder / "dense", layers=4)
    made = Run(folder / "run", {})
    save_tiny(folder / "run" / "model", layers=3, seed=2)
    made.update(model={"path": dense, "layers": 4}, status="finished")
    save_tiny(folder / "other", vocab_size=99)
    return folder


def timed(monkeypatch: pytest.MonkeyPatch, home: Path, *words: object) -> int:
    monkeypatch.chdir(home)
    return exit_code(latency_main, "come-latency", *words, monkeypatch=monkeypatch)


SMALL = ("--new_tokens", 2, "--repeats", 2, "--warmup", 1, "--device", "cpu")


def test_a_run_next_to_its_dense_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, home, "run", *SMALL, "--batch", 1, 2, "--prompt", 4, 8) == 0
    info = json.loads((home / "run" / "latency.json").read_text())
    assert info["dense"]["layers"] == 4 and info["model"]["layers"] == 3
    assert info["dense"]["parameters"] > info["model"]["parameters"]
    loads = [(r["batch"], r["prompt"], r["new_tokens"]) for r in info["results"]]
    assert loads == [(1, 4, 2), (1, 8, 2), (2, 4, 2), (2, 8, 2)]
    for result in info["results"]:
        assert result["dense"]["turns"] == result["model"]["turns"] == 2
        for part in ("prompt", "generation"):
            seconds = result["model"][f"{part}_seconds"]
            assert seconds["low"] <= seconds["median"] <= seconds["high"]
            assert set(result["speed_up"][part]) == {"median", "low", "high"}
    assert info["ideal"]["layers"] == pytest.approx(4 / 3)
    page = (home / "run" / "latency.md").read_text()
    assert "1.33×" in page and page.count("| dense |") == 4 and page.count("| model |") >= 4


def test_both_are_timed_in_the_dense_models_dtype(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(home / "half")
    real = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, dtype, accelerated: real(name, dtype, accelerated=True))
    assert timed(monkeypatch, home, "dense", "--dense", "half", *SMALL, "--prompt", 4, "--output", "half.json") == 0
    info = json.loads((home / "half.json").read_text())
    assert info["dense"]["dtype"] == info["model"]["dtype"] == "bfloat16"


def test_a_checkpoint_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, home, "dense", *SMALL, "--prompt", 4, "--output", "alone.json") == 0
    info = json.loads((home / "alone.json").read_text())
    assert "dense" not in info and "ideal" not in info and "speed_up" not in info["results"][0]
    assert "speed-up" not in (home / "alone.md").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "--new_tokens", 0], "new_tokens 0: expected at least 1"),
        (["run", "--batch", 0], "batch 0: expected at least 1"),
        (["run", "--prompt", "x"], "prompt"),
        (["run", "--prompt", 64], "are more than the 64 positions of the model"),
        (["run", "--warmup", 0], "warmup 0: expected at least 1"),
        (["run", "--dense", "other"], "different vocabularies (97 and 99 tokens)"),
        (["run", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["run", "--output", "bad.md"], "output 'bad.md' cannot be written (the Markdown goes beside the JSON)"),
        (["nothing/at/all"], "does not exist"),
        ([], "model"),
    ],
)
def test_bad_input_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[object], expected: str
) -> None:
    output = [] if "--output" in words else ["--output", "bad.json"]
    assert timed(monkeypatch, home, *words, *output) == 2
    error = capsys.readouterr().err
    assert is_one_line(error, expected)
    assert not (home / "bad.json").exists()
