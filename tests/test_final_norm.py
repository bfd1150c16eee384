"""The final norm's gains: loss and derivatives against whole models and autograd, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, written_by
from test_refit import SOLVABLE, ready, with_one_window
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning import final_norm, head
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Record, Step, replay
from come_pl.surgery import set_weights

ALL = 10**6


def predicted(module: PruningModule, unseen: bool) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(u, bias, teacher's distribution, next token) of each predicted token, one window after the other, with whole
    runs of both models."""
    found = []
    for batch in module.batches:
        for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True):
            if (int(ids.sum()) % 4 == 0) != unseen:
                continue
            inputs = {"input_ids": ids[None], "attention_mask": mask[None].long(), "use_cache": False}
            states: list[Tensor] = []
            handle = module.student.final_norm.register_forward_hook(lambda m, a, out, s=states: s.append(out[0]))
            module.student_model(**inputs)
            handle.remove()
            dense = module.teacher_model(**inputs).logits[0].double().softmax(-1)
            bias = getattr(module.student.final_norm, "bias", None)
            bias = torch.zeros_like(states[0][0]) if bias is None else bias
            for t in range(len(ids) - 1):
                if mask[t] and mask[t + 1]:
                    found.append(((states[0][t] - bias).double(), bias.double(), dense[t], ids[t + 1]))
    return found


def whole_loss(module: PruningModule, tokens: list[Any], factor: Tensor) -> Tensor:
    """Cross-entropy to the half-and-half distribution, of each token."""
    head, losses = module.student_model.get_output_embeddings().weight.double(), []
    for u, bias, dense, following in tokens:
        wanted = dense / 2
        wanted = wanted + 0.5 * torch.nn.functional.one_hot(following, len(wanted))
        losses.append(-(wanted * (head @ (u * factor + bias)).log_softmax(-1)).sum())
    return torch.stack(losses)


def test_a_divergence_is_that_of_both_distributions() -> None:
    decoder, draw = Decoder(tiny_model("llama")), torch.Generator().manual_seed(0)
    dense = 3 * torch.randn(300, decoder.geometry.hidden, generator=draw)
    for far in (0.0, 0.03, 1.0):
        other = dense + far * torch.randn(dense.shape, generator=draw)
        with torch.no_grad():
            found = head.Divergence(decoder, dense)(other)
            p, q = (decoder.logits(h).double().log_softmax(-1) for h in (dense, other))
        expected = (p.exp() * (p - q)).sum(-1)
        assert found.dtype == torch.float64 and (expected > 0).all() == (far > 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("family", SOLVABLE)
@pytest.mark.parametrize("scale", [None, 1.5])
def test_loss_and_derivatives_are_those_of_whole_models(family: str, scale: float | None) -> None:
    module, _, _ = ready(family, Step("drop", [2], scale=scale))
    module.student_model.requires_grad_(False)
    factor = 1 + 0.3 * torch.randn(module.student.geometry.hidden, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        parts = final_norm._positions(module, 4, ALL)
        found = [final_norm._loss(module, part, factor) for part in parts]
        gradient, fisher = final_norm._derivatives(module, parts[0], factor)
    with torch.no_grad():
        tokens = [predicted(module, unseen) for unseen in (False, True)]
    assert [len(part) for part in parts] == [len(t) for t in tokens] and min(map(len, tokens)) > 5
    at = factor.double().requires_grad_()
    losses = [whole_loss(module, t, at) for t in tokens]
    assert found == pytest.approx([float(each.detach().mean()) for each in losses], rel=1e-5)
    [expected] = torch.autograd.grad(losses[0].mean(), at)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    head, outer = module.student_model.get_output_embeddings().weight.double(), torch.zeros_like(fisher)
    for u, bias, _, following in tokens[0]:
        nats = -(head @ (u * at + bias)).log_softmax(-1)[following]
        [own] = torch.autograd.grad(nats, at)
        outer += own.outer(own) / len(tokens[0])
    torch.testing.assert_close(fisher, outer, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_the_gains_help_on_windows_that_they_were_not_fitted_to(family: str) -> None:
    """A final norm that was made wrong is put right; the teacher's stays as it is."""
    module, record, refit = ready(family, Step("drop", [2]))
    norm = module.student.final_norm
    offset = module.student.family.norm_offset
    with torch.no_grad():
        wrong = (norm.weight + offset) * torch.rand(norm.weight.shape).add(0.5) - offset
        set_weights(module.student, {"final_norm.weight": wrong})
        before = predicted(module, True)
        one = torch.ones(module.student.geometry.hidden, dtype=torch.float64)
        start = float(whole_loss(module, before, one).mean())
        gains = final_norm.gains(module, 4, ALL)
        assert gains is not None and gains.dtype == norm.weight.dtype
        set_weights(module.student, {"final_norm.weight": gains})
        after = predicted(module, True)
        assert float(whole_loss(module, after, one).mean()) < start - 1e-3
        assert not torch.equal(module.teacher.final_norm.weight, module.student.final_norm.weight)


def test_a_better_one_is_not_found_where_the_gains_are_the_best() -> None:
    """A student that is the dense model, and text that the dense model wrote: no step helps on unseen windows, and one
    that does is small."""
    model, module = tiny_model(layers=3), PruningModule(monitor=1)
    module.attach(model, Record(3), needs=frozenset())
    with torch.no_grad():
        ids = written_by(model, 64, 41)
        module.training_step({"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, 0)
        gains = final_norm.gains(module, 4, ALL)
        if gains is not None:
            torch.testing.assert_close(gains, module.student.final_norm.weight, rtol=0.3, atol=0.1)
            parts = final_norm._positions(module, 4, ALL)
            factor = gains / module.student.final_norm.weight
            gained = final_norm._loss(module, parts[1], torch.ones_like(factor))
            assert 0 < gained - final_norm._loss(module, parts[1], factor) < 0.01


def test_few_positions_are_spread_evenly() -> None:
    module, _, _ = ready("llama", Step("drop", [2]))
    with torch.inference_mode():
        every = [len(p) for p in final_norm._positions(module, 4, ALL)]
        third = [len(p) for p in final_norm._positions(module, 4, round(module.targets()) // 3)]
    assert sum(every) == module.targets() == 7 * 11 + 6
    assert sum(third) == 7 * 4 + 2, "tokens 1, 4, 7, 10 of eleven, 1, 4 of six"


def test_one_window_is_too_few_and_capped_logits_are_left_alone() -> None:
    for unseen in (False, True):
        module = with_one_window(unseen)
        assert final_norm.gains(module, 4) is None
    capped, _, _ = ready("llama", Step("drop", [2]))
    capped.student.config.final_logit_softcapping = 30.0
    assert final_norm.gains(capped, 4) is None


def test_depths_on_the_way_are_not_what_a_run_to_there_ends_with() -> None:
    assert Refit("down", "step").ends and Refit("all", "end", final=False).ends and Refit("down", sweep=1).ends
    assert not Refit("none").ends and not Refit("down", "step", final=False).ends


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_run_keeps_the_gains_in_its_record(cache: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", layers=5)
    module, record, refit = ready("llama", Step("drop", [2]), cache=cache, parts="all", when="end", final=True)
    record.path = tmp_path / "record.jsonl"
    [step] = record.steps
    refit.after(module, step, record, last=True)
    assert step.weights is not None and "final_norm.weight" in step.weights
    assert step.layers_with_weights == sorted({int(n.split(".")[0]) for n in step.weights if n[0] != "f"})
    record.write()
    again = replay(Record.read(tmp_path / "record.jsonl", 5), model)
    for name, value in module.student_model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(again.model.norm.weight, model.model.norm.weight)
    without, record, refit = ready("llama", Step("drop", [2]), cache=cache, parts="all", when="end", final=False)
    refit.after(without, record.steps[0], record, last=True)
    assert record.steps[0].weights is not None and "final_norm.weight" not in record.steps[0].weights
    early, record, refit = ready("llama", Step("drop", [2]), cache=cache, final=True)
    refit.after(early, record.steps[0], record, last=False)
    assert "final_norm.weight" not in (record.steps[0].weights or {}), "at the target depth only"
