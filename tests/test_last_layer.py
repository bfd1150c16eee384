"""The last layer's output projection: derivatives against autograd on whole models, and what a run makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SOLVABLE, tiny_model, written_by
from test_refit import ready, with_one_window
from torch import Tensor, nn

from come_pl.pruning import head, last_layer
from come_pl.pruning.module import PruningModule
from come_pl.record import Record, Step, replay
from come_pl.surgery import set_weights

ALL = 10**6
Token = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, next token, final state, input of the projection


def projection_of(module: PruningModule) -> nn.Linear:
    return module.student.part(module.student.layers[-1], module.student.family.mlp_output)


def whole(module: PruningModule, unseen: bool) -> list[Token]:
    """Of each predicted token, one window after the other, with whole runs of both models; the loss knows its graph."""
    found: list[Token] = []
    seen: dict[str, Tensor] = {}
    handles = [
        module.student.final_norm.register_forward_pre_hook(lambda m, a: seen.update(h=a[0][0])),
        projection_of(module).register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
    ]
    for batch in module.batches:
        for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True):
            if (int(ids.sum()) % 4 == 0) != unseen:
                continue
            inputs = {"input_ids": ids[None], "attention_mask": mask[None].long(), "use_cache": False}
            logs = module.student_model(**inputs).logits[0].double().log_softmax(-1)
            dense = module.teacher_model(**inputs).logits[0].detach().double().softmax(-1)
            x = seen["x"].detach().reshape(len(ids), -1)
            for t in range(len(ids) - 1):
                if mask[t] and mask[t + 1]:
                    wanted = dense[t] / 2 + F.one_hot(ids[t + 1], logs.shape[-1]) / 2
                    found.append((-(wanted * logs[t]).sum(), ids[t + 1], seen["h"][t].detach(), x[t]))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", SOLVABLE)
@pytest.mark.parametrize("scale", [None, 1.5])
def test_loss_and_derivatives_are_those_of_whole_models(family: str, scale: float | None) -> None:
    module, _, _ = ready(family, Step("drop", [2], scale=scale))
    module.student_model.requires_grad_(False)
    seen, unseen = last_layer._positions(module, 4, ALL)
    own, draw = projection_of(module), torch.Generator().manual_seed(0)
    change = 0.1 * torch.randn(own.weight.shape, generator=draw)
    losses = [last_layer._loss(module, part, change) for part in (seen, unseen)]
    (gradient, g), a = last_layer._derivatives(module, seen, change), last_layer._features(seen)
    before = [row.norm() for row in (seen.read[0])]

    own.weight = nn.Parameter(own.weight + change)
    tokens = whole(module, False)
    assert len(seen) == len(tokens) and min(len(tokens), len(unseen)) > 5
    mean = torch.stack([token[0] for token in tokens]).mean()
    [expected] = torch.autograd.grad(mean, own.weight)
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-3, atol=1e-5)
    assert losses[0] == pytest.approx(mean.item(), rel=1e-5)
    own.weight.requires_grad_(False)
    assert losses[1] == pytest.approx(float(torch.stack([t[0] for t in whole(module, True)]).mean()), rel=1e-5)

    outer, features, width = torch.zeros_like(g), torch.zeros_like(a), module.student.geometry.hidden
    for (_, following, h, x), size in zip(tokens, before, strict=True):
        at = h.clone().requires_grad_()
        nats = -module.student.logits(module.student.final_norm(at)).double().log_softmax(-1)[following]
        [slope] = torch.autograd.grad(nats, at)
        size = size / width**0.5
        outer += (slope * size).double().outer((slope * size).double()) / len(tokens)
        features += (x / size).double().outer((x / size).double()) / len(tokens)
    torch.testing.assert_close(g, outer, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a, features, rtol=1e-3, atol=1e-5)


def test_a_step_is_newton_s_with_curvature_in_factors() -> None:
    draw = torch.Generator().manual_seed(1)

    def positive(width: int) -> Tensor:
        root = torch.randn(width, 2 * width, generator=draw, dtype=torch.float64)
        return root @ root.T

    g, a, gradient = positive(3), positive(5), torch.randn(3, 5, generator=draw, dtype=torch.float64)
    mean = g.diagonal().mean() * a.diagonal().mean()
    for strength in (0.1, 30.0):
        damped = torch.kron(g, a) + strength * mean * torch.eye(15)
        expected = torch.linalg.solve(damped, gradient.flatten()).view(3, 5)
        torch.testing.assert_close(last_layer._step(gradient, g, a)(strength), expected)
    assert not bool(last_layer._step(gradient, g * math.nan, a)(1.0).isfinite().any()), "an eigenproblem would fail"


def test_newton_takes_the_best_strength_and_no_step_that_is_no_better() -> None:
    """f = (x − 3)²; a step of 1 / λ of the way."""
    start, asked = torch.zeros(1), list[float]()

    def loss(x: Tensor) -> float:
        return float((x - 3).square())

    def step(x: Tensor) -> Any:
        return lambda strength: asked.append(strength) or (x - 3) / strength

    found = head.newton(start, loss, step, (0.4, 1.0, 2.0, 4.0, 8.0), 4.0, 1)
    assert found is not None and float(found) == pytest.approx(3) and 8.0 in asked and len(asked) == len(set(asked))
    assert float(head.newton(start, loss, step, (2.0, 4.0), 4.0, 2) or 0) == pytest.approx(2.25), "two halves"
    assert head.newton(start, loss, step, (0.2, 0.4), 0.4, 3) is None, "beyond the other side"
    assert head.newton(start, lambda x: 1.0, step, (1.0, 2.0), 1.0, 3) is None, "no better is not better"
    lost = head.newton(start, loss, lambda x: lambda strength: x * math.nan, (1.0, 2.0), 1.0, 3)
    assert lost is None


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_it_helps_on_windows_that_it_was_not_fitted_to(family: str) -> None:
    """Text that the dense model wrote; an output projection that was made wrong is put right, and the dense model's is
    not touched."""
    model, module = tiny_model(family, layers=3), PruningModule(monitor=1)
    module.attach(model, Record(3), needs=frozenset())
    with torch.no_grad():
        ids = written_by(model, 64, 31)
        module.training_step({"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, 0)
        path = module.student.family.mlp_output
        kept = module.teacher.part(module.teacher.layers[-1], path).weight.clone()

        def unseen() -> float:
            return float(torch.stack([token[0] for token in whole(module, True)]).mean())

        dense = unseen()
        set_weights(module.student, {f"2.{path}.weight": -1.5 * kept})
        module.changed_from(2)
        wrong = unseen()
    new = last_layer.projection(module, 4, ALL)
    assert new is not None and new.dtype == kept.dtype
    with torch.no_grad():
        set_weights(module.student, {f"2.{path}.weight": new})
        assert dense < unseen() < wrong - 0.1 * (wrong - dense)
    assert torch.equal(module.teacher.part(module.teacher.layers[-1], path).weight, kept)


def test_what_cannot_be_solved_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, _, _ = ready("llama", Step("drop", [2]))
    of = last_layer._derivatives
    with monkeypatch.context() as patch:
        patch.setattr(last_layer, "_derivatives", lambda *given: (x * float("nan") for x in of(*given)))
        assert last_layer.projection(lost, 4, ALL) is None
    capped, _, _ = ready("llama", Step("drop", [2]))
    capped.student.config.final_logit_softcapping = 30.0
    assert last_layer.projection(capped, 4) is None
    for unseen in (False, True):
        module = with_one_window(unseen)
        assert last_layer.projection(module, 4) is None, "one window is too few"


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_run_keeps_it_in_its_record(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found, seen = tiny_model("llama", layers=5), {}, []

    def projection(module: PruningModule, folds: int) -> Tensor:
        """What follows the gains of the final norm is on streams that are the student's."""
        final = module.stream(0, 4)
        with torch.no_grad():
            batch = module.batches[0]
            states = module.student.run(batch["input_ids"], batch["attention"])
        torch.testing.assert_close(module.student.final_norm(final), states)
        seen.append(folds)
        return projection_of(module).weight * 2

    monkeypatch.setattr(last_layer, "projection", projection)
    for last in (False, True):
        options: dict[str, Any] = {"parts": "all", "when": "end", "final": True, "last": last}
        module, record, refit = ready("llama", Step("drop", [2]), cache=cache, **options)
        record.path = tmp_path / f"{last}.jsonl"
        [step] = record.steps
        refit.after(module, step, record, last=True)
        found[last] = dict(step.weights or {})
        record.write()
        again = replay(Record.read(record.path, 5), model)
        for name, value in module.student_model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        states = module.student.run(module.batches[0]["input_ids"], module.batches[0]["attention"])
        torch.testing.assert_close(module.student.final_norm(module.stream(0, 4)), states)
    name = "3.mlp.down_proj.weight"
    own = found[False].get(name, model.model.layers[4].mlp.down_proj.weight)
    assert seen == [4] and torch.equal(found[True].pop(name), own * 2)
    assert all(torch.equal(found[False][n], value) for n, value in found[True].items())
    assert "final_norm.weight" in found[True]
    early, record, refit = ready("llama", Step("drop", [2]), cache=cache, last=True)
    refit.after(early, record.steps[0], record, last=False)
    assert seen == [4], "at the target depth only"
