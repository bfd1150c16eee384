"""Layers through torch.compile: the same results, one graph for all layers, and nothing that looks inside is missed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import exit_code, is_one_line
from conftest import FAMILIES, save_tiny, tiny_ids, tiny_model, tiny_text

from come_pl import compiled
from come_pl.cli.prune import prune_main
from come_pl.decoder import Decoder
from come_pl.runs import read_run
from come_pl.taps import boundaries, projection_inputs, token_losses

GRAPHS: list[Any] = []


def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A compiler that compiles nothing and keeps what it is given."""
    GRAPHS.append(graph)
    return graph.forward


def refusing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    raise RuntimeError("no compiler here")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "BACKEND", counting)
    torch.compiler.reset()
    GRAPHS.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("products", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_of_the_layers_as_they_are(family: str, products: torch.dtype | None) -> None:
    model = tiny_model(family, layers=4)
    plain, fast = Decoder(model, products=products), Decoder(model, compiled=True, products=products)
    with torch.inference_mode():
        with boundaries(plain) as expected:
            final = plain.run(tiny_ids())
        with boundaries(fast) as found:
            torch.testing.assert_close(fast.run(tiny_ids()), final)
        assert found.keys() == expected.keys() and len(found) == 5
        for boundary, stream in expected.items():
            torch.testing.assert_close(found[boundary], stream)
        torch.testing.assert_close(
            fast.run(tiny_ids(), start=2, hidden=found[2], skip=[3]),
            plain.run(tiny_ids(), start=2, hidden=expected[2], skip=[3]),
        )
    assert 0 < len(GRAPHS) <= 2, "one for all layers; two where windowed and full attention alternate"
    assert all("forward" not in vars(layer) for layer in model.modules()), "the model is left as it was"


def test_what_is_read_off_inside_of_a_layer_is_not_missed() -> None:
    decoder = Decoder(tiny_model("llama", layers=3), compiled=True)
    seen: list[tuple[str, int]] = []
    with torch.inference_mode():
        decoder.run(tiny_ids())
        with projection_inputs(decoder, 1, lambda kind, layer, x: seen.append((kind, layer))):
            decoder.run(tiny_ids())
    assert seen == [(kind, layer) for layer in (1, 2) for kind in ("attention", "mlp")]


def test_a_changed_weight_counts_and_gradients_run_as_ever() -> None:
    model = tiny_model("llama", layers=3)
    decoder = Decoder(model, compiled=True)
    with torch.inference_mode():
        before = decoder.run(tiny_ids())
        assert len(GRAPHS) == 1
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    model.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros_like(model.model.layers[2].mlp.down_proj.weight)
    )
    with torch.inference_mode():
        after = decoder.run(tiny_ids())
        torch.testing.assert_close(after, Decoder(model).run(tiny_ids()))
        assert not torch.allclose(before, after)
    count = len(GRAPHS)
    mask = torch.ones_like(tiny_ids(), dtype=torch.bool)
    token_losses(decoder, decoder.run(tiny_ids()), tiny_ids(), mask).sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None and len(GRAPHS) == count


def test_a_compiled_run_is_another_run_with_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, text = save_tiny(tmp_path / "m", layers=5), tiny_text(tmp_path / "t.txt")
    words = ["--model.path", model, "--target_layers", 3, "--data.calibration", text, "--data.tokens", 256]
    words += ["--data.seqlen", 16, "--evaluation.data", text, "--evaluation.tokens", 64, "--samples", "false"]
    words += ["--method", "sleb"]
    monkeypatch.chdir(tmp_path)
    assert exit_code(prune_main, "prune.py", *words, "--output", "plain", monkeypatch=monkeypatch) == 0
    assert not GRAPHS
    fast = [*words, "--model.compile", "true", "--output", "fast"]
    assert exit_code(prune_main, "prune.py", *fast, monkeypatch=monkeypatch) == 0
    assert GRAPHS
    infos = [read_run(tmp_path / name) for name in ("plain", "fast")]
    assert infos[0]["groups"] == infos[1]["groups"]
    losses = [info["perplexity"][str(text)]["pruned"] for info in infos]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    capsys.readouterr()
    assert exit_code(prune_main, "prune.py", *words, "--output", "fast", monkeypatch=monkeypatch) == 2
    assert "compile" in capsys.readouterr().err

    monkeypatch.setattr(compiled, "BACKEND", refusing)
    torch.compiler.reset()
    assert exit_code(prune_main, "prune.py", *fast[:-1], "refused", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "torch.compile failed" in said and "leave out --model.compile" in said and is_one_line(said, "error: ")
    assert not (tmp_path / "refused" / "model").exists()
