"""The last layers' output projections: derivatives against autograd on whole models, and what a run makes of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli import exit_code
from conftest import SOLVABLE, save_tiny, tiny_ids, tiny_model, tiny_text, written_by
from test_refit import ready, with_one_window
from torch import Tensor, nn

from come_pl.cli.prune import prune_main
from come_pl.decoder import FAMILIES, Geometry
from come_pl.models import load_model
from come_pl.offload import stored
from come_pl.pruning import head, last_layers
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Record, Step, replay
from come_pl.runs import read_run
from come_pl.surgery import set_weights
from come_pl.taps import streams

ALL = 10**6


def names_of(module: PruningModule, layers: int) -> list[str]:
    family, depth = module.student.family, len(module.student)
    paths = family.attention_output, family.mlp_output
    return [f"{layer}.{path}" for layer in range(depth - layers, depth) for path in paths]


def projection_of(module: PruningModule, name: str) -> nn.Linear:
    layer, _, path = name.partition(".")
    return module.student.part(module.student.layers[int(layer)], path)


def whole_loss(module: PruningModule, unseen: bool) -> Tensor:
    """Mean over predicted tokens, with whole runs of both models; it knows its graph."""
    found: list[Tensor] = []
    for batch in module.batches:
        for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True):
            if (int(ids.sum()) % 4 == 0) != unseen:
                continue
            inputs = {"input_ids": ids[None], "attention_mask": mask[None].long(), "use_cache": False}
            logs = module.student_model(**inputs).logits[0].double().log_softmax(-1)
            dense = module.teacher_model(**inputs).logits[0].detach().double().softmax(-1)
            wanted = dense[:-1] / 2 + F.one_hot(ids[1:], logs.shape[-1]) / 2
            found.append(-(wanted * logs[:-1]).sum(-1)[mask[1:] & mask[:-1]])
    return torch.cat(found).mean()


def whole_factors(module: PruningModule, lowest: int, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(G, A) of each projection, with whole runs; token by token."""
    sums = {name: [0.0, 0.0] for name in names}
    tokens = 0
    for batch in module.batches:
        for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True):
            if int(ids.sum()) % 4 == 0:
                continue
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            handles = []
            for name in names:

                def after(module: nn.Module, args: tuple, output: Tensor, name: str = name, to: Any = seen) -> Tensor:
                    to[name] = args[0].detach(), output + torch.zeros_like(output).requires_grad_()
                    return to[name][1]

                handles.append(projection_of(module, name).register_forward_hook(after))
            with streams(module.student, [lowest]) as stream:
                inputs = {"input_ids": ids[None], "attention_mask": mask[None].long(), "use_cache": False}
                logs = module.student_model(**inputs).logits[0].log_softmax(-1)
            for handle in handles:
                handle.remove()
            picked = mask[1:] & mask[:-1]
            nats = -logs[:-1].gather(-1, ids[1:, None]).squeeze(-1)[picked].sum()
            slopes = torch.autograd.grad(nats, [seen[name][1] for name in names])
            for name, slope in zip(names, slopes, strict=True):
                x, slope = (value.reshape(len(ids), -1) for value in (seen[name][0], slope))
                for t in picked.nonzero().squeeze(1).tolist():
                    size = float(stream[lowest][0, t].detach().square().mean().sqrt())
                    sums[name][0] += (slope[t] * size).double().outer((slope[t] * size).double())
                    sums[name][1] += (x[t] / size).double().outer((x[t] / size).double())
            tokens += int(picked.sum())
    return {name: (g / tokens, a / tokens) for name, (g, a) in sums.items()}  # type: ignore[misc]


@pytest.mark.parametrize("family", SOLVABLE)
@pytest.mark.parametrize("layers, scale", [(1, None), (2, 1.5), (4, None)])
def test_loss_and_derivatives_are_those_of_whole_models(family: str, layers: int, scale: float | None) -> None:
    module, _, _ = ready(family, Step("drop", [2], scale=scale))
    module.student_model.requires_grad_(False)
    last, draw = last_layers._Last(module, layers), torch.Generator().manual_seed(0)
    parts = dict(zip((False, True), last_layers._windows(module, 4, ALL, last.lowest), strict=True))
    assert sum(map(len, parts.values())) == 8 and all(parts.values()), "both kinds are there"
    change = 0.1 * torch.randn(sum(last.sizes), generator=draw)
    losses = {which: last.loss(part, change) for which, part in parts.items()}
    found = last.derivatives(parts[False], change, True)
    names = names_of(module, layers)
    again = last.derivatives(parts[False], change, False)
    assert list(found) == list(again) == names and all(each.curvature is None for each in again.values())
    for name, each in again.items():
        torch.testing.assert_close(each.gradient, found[name].gradient)
    assert last.loss(parts[True], 0 * change) != losses[True]

    for name, own in last.split(change).items():
        projection_of(module, name).weight = nn.Parameter(projection_of(module, name).weight + own)
    weights = [projection_of(module, name).weight for name in names]
    mean = whole_loss(module, False)
    gradients = torch.autograd.grad(mean, weights)
    for weight in weights:
        weight.requires_grad_(False)
    assert losses == {
        False: pytest.approx(mean.item(), rel=1e-5),
        True: pytest.approx(float(whole_loss(module, True)), rel=1e-5),
    }
    factors = whole_factors(module, last.lowest, names)
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(found[name].gradient.float(), gradient, rtol=1e-3, atol=1e-5)
        for got, expected in zip(found[name].sums[1:], factors[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_step_is_newton_s_with_curvature_in_factors() -> None:
    module, _, _ = ready("llama", Step("drop", [2]))
    last, draw = last_layers._Last(module, 1), torch.Generator().manual_seed(1)

    def positive(width: int) -> Tensor:
        root = torch.randn(width, 2 * width, generator=draw, dtype=torch.float64)
        return root @ root.T

    found = {}
    for name, part in last.parts.items():
        rows, columns = part.weight.shape
        gradient = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
        found[name] = last_layers.Derivatives(gradient, (positive(rows), positive(columns)))
    factors: dict[str, Any] = {}
    step = last.step(dict(found), factors)
    again = {name: last_layers.Derivatives(each.gradient, None) for name, each in found.items()}
    for strength in (0.1, 30.0):
        taken = last.split(step(strength))
        for name, each in found.items():
            assert each.curvature is not None
            g, a = each.curvature
            mean = g.diagonal().mean() * a.diagonal().mean()
            damped = torch.kron(g, a) + strength * mean * torch.eye(each.gradient.numel())
            expected = torch.linalg.solve(damped, each.gradient.flatten()).view(each.gradient.shape)
            torch.testing.assert_close(taken[name], expected)
        torch.testing.assert_close(last.step(dict(again), factors)(strength), step(strength))
    found[name].sums[1].mul_(math.nan)
    assert not bool(last.step(found, factors)(1.0).isfinite().any()), "an eigenproblem would fail"


def test_newton_takes_the_best_strength_and_no_step_that_is_no_better() -> None:
    """f = (x − 3)²; a step of 1 / λ of the way."""
    start, asked = torch.zeros(1), list[float]()

    def loss(x: Tensor) -> float:
        asked.append(float(x))
        return float((x - 3).square())

    def step(x: Tensor) -> Any:
        return lambda strength: (x - 3) / strength

    found = head.newton(start, loss, step, (0.4, 1.0, 2.0, 4.0, 8.0), 4.0, 1)
    assert found is not None and float(found) == pytest.approx(3) and 3 / 8 in asked and len(asked) == len(set(asked))
    assert float(head.newton(start, loss, step, (2.0, 4.0), 4.0, 2) or 0) == pytest.approx(2.25), "two halves"
    assert head.newton(start, loss, step, (0.2, 0.4), 0.4, 3) is None, "beyond the other side"
    assert head.newton(start, lambda x: 1.0, step, (1.0, 2.0), 1.0, 3) is None, "no better is not better"
    taken: list[torch.Tensor] = []
    little = head.newton(start, lambda x: 1e-4 * loss(x), lambda x: taken.append(x) or step(x), (2.0, 4.0), 4.0, 2)
    assert little is not None and len(taken) == 1, "no step after one that brought next to nothing"
    lost = head.newton(start, loss, lambda x: lambda strength: x * math.nan, (1.0, 2.0), 1.0, 3)
    assert lost is None


def made_wrong(family: str, layers: int) -> tuple[PruningModule, dict[str, Tensor]]:
    """A module with text that the dense model wrote, and its projections; the student's were made wrong."""
    model, module = tiny_model(family, layers=3), PruningModule(monitor=1)
    module.attach(model, Record(3), needs=frozenset())
    with torch.no_grad():
        ids = written_by(model, 64, 31)
        module.training_step({"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, 0)
        kept = {f"{name}.weight": projection_of(module, name).weight.clone() for name in names_of(module, layers)}
        set_weights(module.student, {name: -0.5 * weight for name, weight in kept.items()})
        module.changed_from(3 - layers)
    return module, kept


@pytest.mark.parametrize("family, layers", [("llama", 1), ("llama", 3), ("gemma", 2), ("opt", 2)])
def test_it_helps_on_windows_that_it_was_not_fitted_to(family: str, layers: int) -> None:
    """The dense model's projections are not touched."""
    module, kept = made_wrong(family, layers)

    def unseen() -> float:
        with torch.no_grad():
            return float(whole_loss(module, True))

    wrong = unseen()
    new = last_layers.projections(module, 4, layers, ALL)
    assert set(new) == set(kept) and all(new[name].dtype == weight.dtype for name, weight in kept.items())
    set_weights(module.student, new)
    right = unseen()
    set_weights(module.student, kept)
    dense = unseen()
    assert dense < right < wrong - 0.1 * (wrong - dense)
    for name, weight in kept.items():
        layer, _, path = name.partition(".")
        assert torch.equal(module.teacher.layers[int(layer)].get_parameter(path), weight)


def test_neither_batches_nor_what_is_kept_of_streams_matter() -> None:
    """Nor do more layers than there are."""
    found = []
    for size, cache, layers in ((64, "ram", 3), (16, "ram", 3), (64, "none", 3), (64, "ram", 8)):
        module, _ = made_wrong("llama", 3)
        [batch] = module.batches
        module.batches = [
            {name: None if value is None else value[begin : begin + size] for name, value in batch.items()}
            for begin in range(0, 64, size)
        ]
        module._states, module._valid, module.cache = [None] * (64 // size), [0] * (64 // size), cache
        module._teacher_states.clear()
        found.append(last_layers.projections(module, 4, layers, 64 * 30 // 2))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_the_beginning_of_a_window_loses_what_is_lost_there() -> None:
    module, _, _ = ready("llama", Step("drop", [2]))
    last = last_layers._Last(module, 2)
    seen, _ = last_layers._windows(module, 4, ALL, last.lowest)
    [window] = [w for w in seen if bool(w.counted.all())][:1]
    short = window.begin()
    assert short.hidden.shape[1] == 6 and len(short.at) == len(short.size) == 5
    change = 0.1 * torch.randn(sum(last.sizes), generator=torch.Generator().manual_seed(0))
    with last._changed(change):
        states = last._states(window)
    told = head.nats(module, short.at, states[:5].__getitem__) / 5
    assert last.loss([short], change) == pytest.approx(float(told), rel=1e-5)
    late = replace(window, counted=torch.arange(11) > 5, at=head.Targets(window.at.y[6:], window.at.following[6:]))
    assert late.begin() is late, "nothing is predicted in its first half"


def test_curvature_is_taken_from_some_windows_and_the_gradient_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = made_wrong("llama", 1)
    last = last_layers._Last(module, 1)
    every, _ = last_layers._windows(module, 4, ALL, last.lowest)
    assert all(window.curved for window in every)
    monkeypatch.setattr(last_layers, "CURVED", module.targets() / 2)
    seen, _ = last_layers._windows(module, 4, ALL, last.lowest)
    some = [window for window in seen if window.curved]
    assert len(seen) == len(every) and 0 < len(some) < len(seen)
    change = torch.zeros(sum(last.sizes))
    found, whole = last.derivatives(seen, change, True), last.derivatives(every, change, True)
    alone = last.derivatives(some, change, True)
    none = last.derivatives([replace(window, curved=False) for window in seen], change, True)
    for name, each in found.items():
        torch.testing.assert_close(each.gradient, whole[name].gradient)
        for own, of_some, of_all, of_none in zip(
            *(source[name].curvature or () for source in (found, alone, whole, none)), strict=True
        ):
            torch.testing.assert_close(own, of_some)
            torch.testing.assert_close(of_none, of_all)
            assert not torch.allclose(own, of_all)


def test_about_so_many_tokens_are_looked_at() -> None:
    module, _ = made_wrong("llama", 1)
    for tokens, least, most in ((ALL, 64, 64), (64 * 30 // 4, 8, 26)):
        seen, unseen = last_layers._windows(module, 4, tokens, 2)
        assert least <= len(seen) + len(unseen) <= most and seen and unseen
    assert not all(last_layers._windows(module, 4, 1, 2)), "so few that one kind is left out"
    assert last_layers.projections(module, 4, 1, 1), "then all are taken"


def test_what_cannot_be_solved_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, _, _ = ready("llama", Step("drop", [2]))
    with monkeypatch.context() as patch:
        patch.setattr(last_layers._Last, "step", lambda *_: lambda strength: torch.full((10,), math.nan))
        assert last_layers.projections(lost, 4, 2, ALL) == {}
    capped, _, _ = ready("llama", Step("drop", [2]))
    capped.student.config.final_logit_softcapping = 30.0
    assert last_layers.projections(capped, 4, 2) == {}
    for unseen in (False, True):
        module = with_one_window(unseen)
        assert last_layers.projections(module, 4, 2) == {}, "one window is too few"


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_run_keeps_it_in_its_record(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found, seen = tiny_model("llama", layers=5), {}, []

    def projections(module: PruningModule, folds: int, layers: int) -> dict[str, Tensor]:
        """What follows the gains of the final norm is on streams that are the student's."""
        final = module.stream(0, 4)
        with torch.no_grad():
            batch = module.batches[0]
            states = module.student.run(batch["input_ids"], batch["attention"])
        torch.testing.assert_close(module.student.final_norm(final), states)
        seen.append((folds, layers))
        return {f"{name}.weight": projection_of(module, name).weight * 2 for name in names_of(module, layers)}

    monkeypatch.setattr(last_layers, "projections", projections)
    for last in (0, 2):
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
    dense = model.model.layers
    for layer, path in itertools.product((2, 3), ("self_attn.o_proj.weight", "mlp.down_proj.weight")):
        own = found[0].pop(f"{layer}.{path}", dense[layer + 1].get_parameter(path))
        assert torch.equal(found[2].pop(f"{layer}.{path}"), own * 2)
    assert seen == [(4, 2)] and found[0].keys() == found[2].keys() and "final_norm.weight" in found[2]
    assert all(torch.equal(found[0][name], value) for name, value in found[2].items())
    early, record, refit = ready("llama", Step("drop", [2]), cache=cache, last=2)
    refit.after(early, record.steps[0], record, last=False)
    assert seen == [(4, 2)], "at the target depth only"


def test_matrices_on_disk_are_there_for_autograd(tmp_path: Path) -> None:
    checkpoint, found = save_tiny(tmp_path / "dense", layers=3), []
    ids = tiny_ids(windows=8, seq=12)
    for offload in ("none", "disk"):
        model, module = load_model(checkpoint, "float32", offload, tmp_path / offload), PruningModule(monitor=1)
        module.attach(model, Record(3), needs=frozenset(), scratch=tmp_path / f"{offload}-streams")
        module.training_step({"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, 0)
        assert bool(stored(module.student.layers[0])) == (offload == "disk")
        last = last_layers._Last(module, 2)
        seen, unseen = last_layers._windows(module, 4, ALL, last.lowest)
        change = torch.full((sum(last.sizes),), 0.01)
        derivatives = last.derivatives(seen, change, True)
        found.append(([vars(each) for each in derivatives.values()], last.loss(unseen, change)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_how_many_layers_with_offload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tiny_text(tmp_path / "text.txt")
    words = ["--model.path", save_tiny(tmp_path / "dense"), "--data.calibration", text, "--evaluation.data", text]
    words += ["--data.tokens", 128, "--data.seqlen", 16, "--evaluation.tokens", 64, "--target_layers", 3]
    words += ["--method", "shortgpt", "--offload", "disk", "--output", tmp_path / "run"]
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
    assert read_run(tmp_path / "run")["refit"]["last"] == 1


def test_how_many_layers() -> None:
    llama = FAMILIES[0]
    assert Refit("all").resolved("shortgpt", llama).last == last_layers.LAYERS == 12
    assert Refit("all").resolved("shortgpt", llama, 5).last == 5
    assert Refit("all", last=3).resolved("shortgpt", llama, 5).last == 3
    smollm2, llama_8b = Geometry(576, 1536, 9, 3, 64), Geometry(4096, 14336, 32, 8, 128)
    assert last_layers.affordable(smollm2) == 12 and last_layers.affordable(smollm2, offloaded=True) == 1
    assert last_layers.affordable(llama_8b) == 2, "3.5 GiB each"
    assert last_layers.affordable(Geometry(16384, 53248, 128, 8, 128)) == 1
    with pytest.raises(ValueError, match="last -1"):
        Refit("all", last=-1)
