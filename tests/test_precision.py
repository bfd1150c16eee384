"""Products of fp32 weights in bfloat16: what is computed in it and what is not, and which runs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli import exit_code, is_one_line, records
from conftest import FAMILIES, save_tiny, tiny_ids, tiny_model, tiny_text
from safetensors.torch import load_file
from test_drop_methods import measured
from test_loop import lines, prune
from test_offload import OTHERS
from test_refit import ready

from come_pl import models
from come_pl.cli import common
from come_pl.cli.prune import prune_main
from come_pl.decoder import Decoder
from come_pl.pruning import final_norm, head, last_layers
from come_pl.pruning.methods import METHODS
from come_pl.pruning.methods.shortest_path import BridgedModel, ShortestPath
from come_pl.pruning.refit import Refit
from come_pl.pruning.regression import NormalEquations
from come_pl.record import Step
from come_pl.runs import read_run
from come_pl.taps import LayerStatistics, boundaries, projection_inputs

HALF = torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_in_bfloat16_and_streams_and_logits_are_not(family: str) -> None:
    model = tiny_model(family, layers=3)
    plain, mixed = Decoder(model), Decoder(model, products=HALF)
    told: list[tuple[str, int, torch.Tensor]] = []
    products: list[torch.Tensor] = []
    last = mixed.part(mixed.layers[2], mixed.family.mlp_output)
    handle = last.register_forward_hook(lambda module, args, output: products.append(output))
    with torch.inference_mode():
        with boundaries(mixed) as streams, projection_inputs(mixed, 0, lambda *found: told.append(found)):
            final = mixed.run(tiny_ids())
        handle.remove()
        whole = plain.run(tiny_ids())
        assert not torch.is_autocast_enabled("cpu"), "only while layers run"
        assert all(stream.dtype == torch.float32 for stream in streams.values()) and final.dtype == torch.float32
        assert len(told) == 6 and all(x.dtype == HALF for *_, x in told)
        bias = None if last.bias is None else last.bias.to(HALF)
        torch.testing.assert_close(products[0], F.linear(told[-1][2], last.weight.to(HALF), bias), rtol=0, atol=0)
        difference = float((final - whole).norm() / whole.norm())
        assert 1e-5 < difference < 0.03
        assert torch.equal(mixed.logits(whole), plain.logits(whole))
        torch.testing.assert_close(
            mixed.run(tiny_ids(), start=2, hidden=streams[2]), final, rtol=0, atol=0, msg="a part is the same"
        )


def test_a_trainers_own_autocast_goes_on() -> None:
    model = tiny_model("llama", layers=2)
    with torch.inference_mode():
        with torch.autocast("cpu", dtype=HALF):
            within = Decoder(model).run(tiny_ids())
        assert torch.equal(within, Decoder(model, products=HALF).run(tiny_ids()))


def test_at_the_head_derivatives_are_mixed_and_losses_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = ready("llama", Step("drop", [2]))
    module.student_model.requires_grad_(False)
    plain = last_layers._Last(module, 2)
    seen, unseen = last_layers._windows(module, 4, 10**6, plain.lowest)
    nothing = torch.zeros(sum(plain.sizes))
    expected = plain.derivatives(seen, nothing, True)
    loss = plain.loss(unseen, nothing)
    module.student.products = module.teacher.products = HALF
    told: list[torch.dtype] = []
    halves: list[torch.dtype] = []
    expected_of = head.expected
    monkeypatch.setattr(head, "expected", lambda weight, h: halves.append(weight.dtype) or expected_of(weight, h))
    module.student_model.lm_head.register_forward_hook(lambda m, args, output: told.append(output.dtype))
    outer, summed = last_layers.add_outer, set[bool]()
    spied = lambda *a: (summed.add(torch.is_autocast_enabled("cpu")), outer(*a))  # noqa: E731
    monkeypatch.setattr(last_layers, "add_outer", spied)
    mixed = plain.derivatives(seen, nothing, True)
    assert set(halves) == {HALF} and not told and summed == {True}
    halves.clear()
    assert plain.loss(unseen, nothing) == pytest.approx(loss, rel=1e-3) and set(told) == {torch.float32}
    told.clear()
    final_norm._loss(module, final_norm._positions(module, 4, 10**6)[1], torch.ones(module.student.geometry.hidden))
    assert set(told) == {torch.float32} and set(halves) == {HALF}, "the dense model's targets"
    for name, each in mixed.items():
        for got, value in zip(each.sums, expected[name].sums, strict=True):
            assert got.dtype == torch.float64
            assert 1e-5 < float((got - value).norm() / value.norm()) < 0.05, (name, value.shape)


def test_a_head_is_cast_once_for_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = ready("llama", Step("drop", [2]))
    module.student_model.requires_grad_(False)
    module.student.products = module.teacher.products = HALF
    last, casts = last_layers._Last(module, 2), list[Any]()
    begin = head.Expected.__init__
    monkeypatch.setattr(head.Expected, "__init__", lambda *given: casts.append(given) or begin(*given))
    final_norm._positions(module, 4, 10**6)
    assert len(casts) == 1
    seen, _ = last_layers._windows(module, 4, 10**6, last.lowest)
    assert len(casts) == 2 and len(seen) > 1
    last.derivatives(seen, torch.zeros(sum(last.sizes)), True)
    assert len(casts) == 3
    tied = casts[-1][0]
    assert tied.head.dtype == HALF and tied.weight is tied.head


@pytest.mark.parametrize("products", [None, HALF])
def test_sums_of_a_regression_are_of_products_in_that_precision(
    products: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair's, of outputs and of what is read, and the choice's; what is solved is not."""
    told: list[tuple[bool, bool]] = []
    add, solved = NormalEquations.add, NormalEquations._change

    def added(self: Any, x: Any, r: Any, weight: Any, fold: int) -> None:
        told.append((True, torch.is_autocast_enabled("cpu")))
        before = self.a[fold].clone(), self.b[fold].clone()
        add(self, x, r, weight, fold)
        root = weight.sqrt()[:, None]
        wide, short = ((value.float() * root).to(products or torch.float32).double() for value in (x, r))
        if self.bias:
            wide = torch.cat([wide, root.to(products or torch.float32).double()], 1)
        close = {"rtol": 2**-7 if products else 1e-4, "atol": 1e-4 * max(1.0, float(wide.abs().max()) ** 2)}
        if not self.known:
            torch.testing.assert_close(self.a[fold] - before[0], wide.T @ wide, **close)
        torch.testing.assert_close(self.b[fold] - before[1], short.T @ wide, **close)

    def change(*args: Any) -> Any:
        told.append((False, torch.is_autocast_enabled("cpu")))
        return solved(*args)

    module, record, _ = ready("opt", Step("drop", [2]))
    module.student.products = module.teacher.products = products
    monkeypatch.setattr(NormalEquations, "add", added)
    monkeypatch.setattr(NormalEquations, "_change", change)
    Refit("all", "step", folds=2, final=False).after(module, record.steps[-1], record, last=False)
    assert set(told) == {(True, products is not None), (False, False)}
    told.clear()
    module = measured(tiny_model("llama", layers=4), ShortestPath())
    module.student.products = products
    BridgedModel(module, 1, 3).divergence([(2, 3)])
    assert set(told) == {(True, products is not None), (False, False)}


@pytest.mark.parametrize("products", [None, HALF])
def test_channels_are_what_the_layer_gives_in_either_precision(products: torch.dtype | None) -> None:
    decoder = Decoder(tiny_model("llama", layers=2), products=products)
    told: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    decoder.layers[1].mlp.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.inference_mode(), projection_inputs(decoder, 1, lambda kind, layer, x: told.append(x)):
        decoder.run(tiny_ids())
        inputs = [(decoder.part(decoder.layers[1], path).weight, None) for path in decoder.family.mlp_inputs]
        assert torch.equal(decoder.mlp_channels(read[0], inputs), told[-1])


@pytest.mark.parametrize("method", METHODS)
def test_methods_and_the_same_with_a_trainer_that_autocasts(method: str, tmp_path: Path) -> None:
    repaired = {"shortest_path": Refit("all", when="end"), "come": Refit("down", when="step")}.get(method)
    options = OTHERS.get(method, {})
    found = [
        prune(tmp_path / name, method=METHODS[method](**options), refit=repaired, products=HALF, trainer=settings)
        for name, settings in (("alone", {}), ("within", {"precision": "bf16-mixed"}))
    ]
    for module in found:
        assert len(module.student) == 3 and module.student is not module.teacher
        assert all(value.dtype == torch.float32 for value in module.student_model.parameters())
        assert all(bool(value.isfinite().all()) for value in module.student_model.parameters())
    assert lines(found[0]) == lines(found[1])


def test_statistics_are_collected_outside_of_a_trainers_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    within: list[bool] = []
    update = LayerStatistics.update

    def seen(self: LayerStatistics, *args: Any) -> None:
        within.append(torch.is_autocast_enabled("cpu"))
        update(self, *args)

    monkeypatch.setattr(LayerStatistics, "update", seen)
    prune(tmp_path, method=METHODS["shortgpt"](), trainer={"precision": "bf16-mixed"})
    assert within and not any(within)


def _words(tmp_path: Path, *more: object) -> list[object]:
    text = tiny_text(tmp_path / "t.txt")
    words: list[object] = ["--model.path", save_tiny(tmp_path / "m", layers=5), "--data.calibration", text]
    words += ["--data.tokens", 512, "--data.seqlen", 16, "--evaluation.data", text, "--evaluation.tokens", 64]
    return [*words, "--target_layers", 3, "--samples", "false", *more]


def test_a_run_in_mixed_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = _words(tmp_path, "--refit_last", 1)
    monkeypatch.chdir(tmp_path)

    def run(output: str, *more: object) -> int:
        return exit_code(prune_main, "prune.py", *words, "--output", output, *more, monkeypatch=monkeypatch)

    mixed = ("--trainer.precision", "bf16-mixed")
    assert run("plain") == 0 and run("mixed", *mixed) == 0 and run("disk", *mixed, "--cache", "disk") == 0
    assert run("streamed", *mixed, "--offload", "disk") == 0
    infos = {name: read_run(tmp_path / name) for name in ("plain", "mixed", "disk", "streamed")}
    assert infos["mixed"]["model"]["precision"] == "bf16-mixed" and "precision" not in infos["plain"]["model"]
    assert "float32, bf16-mixed" in (tmp_path / "mixed" / "report.html").read_text()
    for name in ("disk", "streamed"):  # inputs are known, or computed again; weights are there, or read for a product
        assert records(tmp_path / name) == records(tmp_path / "mixed"), name
    weights = {name: load_file(tmp_path / name / "model" / "model.safetensors") for name in infos}
    assert all(value.dtype == torch.float32 for value in weights["mixed"].values())
    for name, value in weights["mixed"].items():
        assert torch.equal(value, weights["disk"][name]) and torch.equal(value, weights["streamed"][name])
    assert any(not torch.equal(value, weights["plain"][name]) for name, value in weights["mixed"].items())
    [before] = {info["perplexity"][str(tmp_path / "t.txt")]["dense"] for info in infos.values()}  # in fp32
    after = [info["perplexity"][str(tmp_path / "t.txt")]["pruned"] for info in infos.values()]
    assert infos["mixed"]["groups"] == infos["plain"]["groups"] and after[1] == pytest.approx(after[0], rel=0.02)
    assert before != after[0]

    capsys.readouterr()
    assert run("mixed") == 2, "the folder is of a run with other numbers"
    assert "precision" in capsys.readouterr().err


@pytest.mark.parametrize("given", [True, False])
def test_weights_in_half_precision_are_computed_with_as_they_are(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = _words(tmp_path, "--method", "shortgpt", "--output", "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "multiplies_bfloat16", lambda: True)
    if given:
        words += ["--model.dtype", "bfloat16"]
    else:  # what auto is on an accelerator, with a checkpoint in bfloat16
        load = models.load_model
        monkeypatch.setattr(models, "load_model", lambda *args: load(*args).to(HALF))
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
    assert "precision" not in read_run(tmp_path / "run")["model"]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64"])
def test_another_precision_is_refused(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = _words(tmp_path, "--trainer.precision", precision, "--output", tmp_path / "run")
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert precision in said and is_one_line(said, "--model.dtype")
    assert not (tmp_path / "run").exists()


def test_without_one_it_goes_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for native, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(common, "multiplies_bfloat16", lambda native=native: native)
        assert common.with_half(None, "auto") == common.with_half(None, "cpu") == expected
        assert common.with_half("32", "cpu") == common.with_half(32, "auto") == "32-true"
        assert common.with_half("bf16", "cpu") == "bf16-mixed"
        assert common.with_half(None, "xpu") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert common.with_half(None, "auto") == common.with_half(None, "gpu") == expected


def test_which_processors_multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not common.multiplies_bfloat16(), "ATEN_CPU_CAPABILITY says so in these tests"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for dot, tiles in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda dot=dot: dot)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert common.multiplies_bfloat16() == (dot or tiles)
