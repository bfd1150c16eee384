"""The benchmarks on tiny models: naive searches decide as ours do, and the command writes its table and resumes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model

from benchmarks import measure, naive, run
from benchmarks.cost import counted
from come_pl.decoder import Decoder
from come_pl.pruning.methods.base import Method
from come_pl.pruning.methods.come import CoMe
from come_pl.pruning.methods.come_p import CoMeP
from come_pl.pruning.methods.sleb import SLEB
from come_pl.pruning.module import PruningModule
from come_pl.record import Record

MODEL, TOKENS, SEQ = "random:6x32x97", 48, 12
SMALL = ["--model", MODEL, "--tokens", str(TOKENS), "--seqlen", str(SEQ), "--threads", "1"]


def tiny_data() -> Any:
    return measure.calibration(MODEL, "", TOKENS, SEQ)


@pytest.mark.parametrize("method", [CoMe(), CoMe(rho=0.0, span_tokens="last"), CoMeP(), SLEB(), SLEB(barriers=0)])
@pytest.mark.parametrize("family, gqa", [("llama", True), ("qwen3", True), ("opt", False)])
def test_naive_and_ours_decide_the_same(method: Method, family: str, gqa: bool):
    dense, data = tiny_model(family, gqa=gqa, layers=6), tiny_data()
    ours = measure.prune(method, dense, data, 3).record.steps
    theirs = naive.prune(method, dense, measure.batches(data), 3).steps
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs):
        assert (one.kind, one.layers, one.kept) == (other.kind, other.layers, other.kept)
        assert one.ratio == pytest.approx(other.ratio, abs=1e-5)
    assert measure.choices(ours) == measure.choices(theirs)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_naive_statistics_are_ours(family: str):
    dense, ids = tiny_model(family, layers=4), measure.batches(tiny_data())
    module = PruningModule()
    module.attach(dense, Record(4), needs=CoMe.needs)
    for index, batch in enumerate(ids):
        module.training_step({"input_ids": batch, "mask": torch.ones_like(batch, dtype=torch.bool)}, index)
    expected = module.statistics.compute()
    with torch.inference_mode():
        found = naive.statistics(Decoder(dense), ids)
    assert set(found) == set(expected) - {"tokens"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hidden, heads, kv_heads", [(32, 4, 2), (576, 9, 1), (2048, 32, 4)])
def test_random_models_can_run(hidden: int, heads: int, kv_heads: int):
    model = measure.load(f"random:1x{hidden}x97", "float32")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (heads, kv_heads)
    assert bool(model(torch.tensor([[5, 6, 7]])).logits.isfinite().all())


def test_costs_of_a_small_run():
    """Passes by hand, of six layers and two batches of two windows."""
    dense, data = tiny_model(layers=6), tiny_data()
    ids = measure.batches(data)
    with counted(dense, TOKENS) as cost:
        steps = naive.prune(SLEB(), dense, ids, 4).steps
    assert len(steps) == 2 and cost.layer_tokens == (4 * 5 + 3 * 4) * TOKENS and cost.head_tokens == (4 + 3) * TOKENS
    with counted(dense, TOKENS) as cost:
        naive.prune(CoMeP(granularity=4), dense, ids, 5)
    assert cost.passes == pytest.approx(1 + 5 * 5 / 6) and cost.head_passes == 6
    with counted(dense, TOKENS) as cost:
        [step] = measure.prune(CoMe(), dense, data, 5).record.steps
    monitored = (5 - step.layers[0]) / 6 / 4  # of the student, one window of four; the teacher is the first student
    assert cost.passes == pytest.approx(1 + monitored) and cost.head_passes == 0.5


@pytest.mark.parametrize("method", [CoMeP(), CoMeP(search="coarse"), SLEB()])
def test_ours_runs_fewer_layers(method: Any):
    dense, data = tiny_model(layers=6), tiny_data()
    ours, theirs = (measure.run(method, dense, data, 2, 1, ours=ours) for ours in (True, False))
    assert ours.passes < theirs.passes and ours.seconds > 0 and len(ours.choices) == 2
    if getattr(method, "search", "full") == "full":
        assert ours.choices == theirs.choices


def test_the_command_writes_a_table_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    out = tmp_path / "speed.csv"
    options = [*SMALL, "--out", str(out), "--growth", f"4x32@{SEQ}"]
    # each side of a row in a process of its own, as always, for one row; the others here, for the sake of seconds
    run.main([*options, "--rows", "sleb"])
    processes: list[tuple[str, str]] = []

    def here(task: dict[str, Any], side: str) -> dict[str, Any]:
        processes.append((task["row"], side))
        return run.one(task | {"side": side}).to_dict()

    monkeypatch.setattr(run, "measured", here)
    run.main([*options, "--rows", ",".join(run.ROWS)])
    wanted = [(name, side) for name in run.ROWS if name != "sleb" for side in ("ours", "naive")]
    for name in ("come_race", "come_p_race", "come_p_coarse", "come_p_coarse_race", "come_p_coarse_race_close"):
        wanted.remove((name, "naive"))  # the one of come or come_p
    wanted[wanted.index(("sleb_race", "naive"))] = ("sleb", "naive")  # which was run in another process
    assert processes == wanted
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [r["row"] for r in rows] == ["sleb", *(name for name in run.ROWS if name != "sleb")]
    for row in rows:
        assert float(row["seconds"]) > 0 and float(row["naive_seconds"]) > 0 and float(row["passes"]) >= 1
        assert row["calibration"] == "random tokens" and row["threads"] == "1" and row["dtype"] == "float32"
        assert row["model"] == (MODEL if row["row"] != "growth" else "random:4x32") and row["steps"] == "1"
        if row["row"] in ("come", "come_p", "sleb", "growth"):
            assert row["same"] == "1 of 1"
        assert bool(row["bare"]) == bool(row["naive_bare"]) == (row["row"] == "statistics")
    shown = capsys.readouterr().out
    assert "| come_p_coarse | " in shown
    del processes[:]
    run.main([*options, "--rows", "come,sleb", "--steps", "1"])
    assert not processes, "finished rows are not run again"
    run.main([*options, "--rows", "come", "--naive_dtype", "none"])
    assert processes == [("come", "ours")]


@pytest.mark.parametrize(
    "options, why",
    [
        (["--rows", "fast"], "row 'fast' is not known; known: statistics, come"),
        (["--model", "random:6"], "model 'random:6': expected random:LAYERSxHIDDEN"),
        (["--model", "random:6x70"], "70 is no multiple of its 4 heads"),
        (["--tokens", "5"], "5 tokens make no window of 12"),
        (["--steps", "5"], "5 steps leave 1 of 6 layers"),
        (["--growth", "4x32"], "growth '4x32': expected LAYERSxHIDDEN@TOKENS"),
    ],
)
def test_bad_options(options: list[str], why: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(run, "measured", lambda task, side: run.one(task | {"side": side}).to_dict())
    rows = "growth" if "--growth" in options else "sleb"
    with pytest.raises(SystemExit, match=why):
        run.main([*SMALL, "--out", str(tmp_path / "x.csv"), "--rows", rows, *options])


def test_a_row_that_fails_says_why(tmp_path: Path):
    with pytest.raises(SystemExit, match="row sleb of nowhere.x/y/z, ours: .*does not exist"):
        run.main(["--model", "nowhere.x/y/z", "--rows", "sleb", "--out", str(tmp_path / "x.csv")])
