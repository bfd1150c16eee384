"""Methods that drop layers against brute force: layers really deleted, plain autograd, sums by hand."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny, tiny_model, tiny_text
from test_come import IDS, MASK, naive_loss, one_pass, rebuilt
from test_loop import LAYERS, lines, prune
from torch import Tensor

from come_pl import surgery
from come_pl.cli.prune import prune_main
from come_pl.decoder import Decoder, attention_mask
from come_pl.pruning.methods import METHODS, find
from come_pl.pruning.methods.base import Method, NoSite
from come_pl.pruning.methods.drops import Drop
from come_pl.pruning.methods.magnitude import Magnitude, MagnitudePlus, weights_of
from come_pl.pruning.methods.prune_comp import PruneComp
from come_pl.pruning.methods.reverse import Reverse
from come_pl.pruning.methods.shortgpt import ShortGPT, angular_distances
from come_pl.pruning.methods.sleb import SLEB
from come_pl.pruning.methods.taylor import Taylor, TaylorPlus
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.record import Record, Step
from come_pl.taps import boundaries, stream_at, targets_of, token_losses

FAMILIES = ("llama", "qwen2-mixed", "opt", "gemma2")
DROPS = [name for name, method in METHODS.items() if issubclass(method, Drop)]


def measured(model: Any, method: Method, **options: Any) -> PruningModule:
    """A module after its first pass."""
    module = PruningModule(**options)
    record = Record(len(Decoder(model)))
    module.attach(model, record, needs=method.needs_for(record), span=method.span)
    one_pass(module)
    return module


def steps(module: PruningModule, method: Method, count: int) -> list[int]:
    """Student layers that the next `count` steps drop, as the loop takes them."""
    chosen = []
    for left in range(count, 0, -1):
        statistics = module.statistics.compute() if module.needs - {"streams"} else {}
        decision = method(module, statistics, module.record, remove=left)
        chosen.append(decision.step.layers[0])
        module.do(decision.step)
        module.record.append(decision.step)
        module.needs = method.needs_for(module.record)
        one_pass(module)
    return chosen


def dense_order(chosen: list[int], depth: int) -> list[int]:
    """The same layers by their number in the dense model."""
    alive = list(range(depth))
    return [alive.pop(index) for index in chosen]


def streams(model: Any) -> list[list[Tensor]]:
    """For each window the streams (real tokens, hidden) at every boundary, from a run without padding."""
    decoder, found = Decoder(model), []
    for row, real in zip(IDS, MASK):
        with torch.no_grad(), boundaries(decoder) as states:
            decoder.run(row[real][None])
        found.append([states[b][0].double() for b in range(len(decoder) + 1)])
    return found


# -- ShortGPT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_shortgpt_drops_the_k_smallest_influences(family: str):
    model = tiny_model(family, layers=7)
    turned = [
        torch.cat([1 - F.cosine_similarity(s[i], s[i + 1], dim=-1).clamp(0, 1) for s in streams(model)]).mean()
        for i in range(7)
    ]
    expected = sorted(range(7), key=lambda i: float(turned[i]))
    module = measured(model, ShortGPT())
    assert dense_order(steps(module, ShortGPT(), 5), 7) == expected[:5]
    assert module.record.steps[0].scores["block_influence"] == pytest.approx([float(t) for t in turned], rel=1e-5)
    for step, left in zip(module.record.steps, range(7, 2, -1)):
        assert step.kind == "drop" and len(step.scores["block_influence"]) == left


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [1, 3])
def test_angular_block(family: str, block: int):
    """The last real token of each window, not its last position."""
    model = tiny_model(family, layers=6)
    expected = [
        sum(
            math.acos(max(-1.0, min(1.0, float(F.cosine_similarity(s[i][-1], s[i + block][-1], dim=0))))) / math.pi
            for s in streams(model)
        )
        / len(IDS)
        for i in range(6 - block + 1)
    ]
    method = ShortGPT(angular=True)
    module = measured(model, method)
    assert module.needs == frozenset() and module.start == 0, "one pass of its own is all that it needs"
    assert angular_distances(module, block) == pytest.approx(expected, rel=1e-4)
    step = method(module, {}, module.record, remove=block).step
    first = expected.index(min(expected))
    assert step.layers == list(range(first, first + block))
    module.do(step)
    assert len(module.student) == 6 - block


# -- SLEB --------------------------------------------------------------------------------------------------------------


def deleted_loss(module: PruningModule, layers: list[Any], types: list[str] | None) -> float:
    """The calibration loss of a separate model of these layers, run whole from the embeddings."""
    naive = PruningModule(cache="none")
    model = rebuilt(module.teacher_model, layers, types)
    naive.attach(model, Record(len(layers)), needs=frozenset())
    one_pass(naive)
    return naive.loss()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("barriers", [0, 1, 2])
def test_sleb_is_naive_sleb_bit_for_bit(family: str, barriers: int, monkeypatch: pytest.MonkeyPatch):
    """Cached prefixes and giving up early against models whose layer is really deleted, at every step."""
    dense = tiny_model(family, layers=7)
    method = SLEB(barriers=barriers)
    module = measured(dense, method)
    given_up = 0
    for _ in range(3):
        layers = list(module.student.layers)
        types = getattr(module.student.config, "layer_types", None)
        naive = [math.inf] * len(layers)
        for j in range(barriers, len(layers) - barriers):
            kept = None if types is None else types[:j] + types[j + 1 :]
            naive[j] = deleted_loss(module, layers[:j] + layers[j + 1 :], kept)
            assert module.loss(j, skip=[j]) == naive[j]
        [chosen] = steps(module, method, 1)
        found: list[float] = module.record.steps[-1].scores["loss_without"]
        assert chosen == naive.index(min(naive)) and found[chosen] == naive[chosen]
        for a, b in zip(found, naive):
            assert a == b or (a == math.inf and b > min(naive))
        given_up += found.count(math.inf) - 2 * barriers
    assert given_up > 0 or barriers == 2
    if family == "llama":
        expected = naive_loss(rebuilt(dense, list(module.student.layers)))
        assert module.loss() == pytest.approx(expected, rel=1e-5)


def test_sleb_on_some_windows_looks_at_no_others():
    """Its passes run on these alone, too, and the loss is that of a module that was given no others."""
    dense, method = tiny_model("llama", layers=7), SLEB(windows=1)  # rounded up to a whole batch
    module = measured(dense, method)
    assert len(module.batches) > 1 and method.pass_windows == 1
    module.pass_windows = 1
    for _ in range(3):
        layers = list(module.student.layers)
        few = PruningModule(cache="none")
        few.attach(rebuilt(dense, layers), Record(len(layers)), needs=frozenset())
        one_pass(few)
        del few.batches[1:], few._states[1:]
        naive = [few.loss(skip=[j]) if 0 < j < len(layers) - 1 else math.inf for j in range(len(layers))]
        for j in range(1, len(layers) - 1):
            assert module.loss(j, skip=[j], windows=1) == naive[j] != module.loss(0, skip=[j])
        assert steps(module, method, 1) == [naive.index(min(naive))]
    with pytest.raises(ValueError, match="windows 0"):
        SLEB(windows=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compensate", ["none", "magnitude"])
def test_bridged_sleb_is_a_map_from_normal_equations_and_a_whole_run(family: str, compensate: Any):
    """Each candidate's map from sums over the tokens of the second batch, its loss on the first one."""
    dense = tiny_model(family, layers=6)
    method = SLEB(windows=1, bridge=2, compensate=compensate)
    module = measured(dense, method)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    bridged = 0
    for _ in range(2):
        depth, record, student = len(module.student), module.record, module.student
        ids, mask, naive = IDS[:2], MASK[:2], [math.inf] * len(module.student)
        for j in range(1, depth - 1):
            end = record.groups[j][-1] + 1
            here = [s[j] for s in streams(module.student_model)[2:4]]  # (tokens, hidden) of each window of batch 1
            there = [s[end] * record.scale_at(end) for s in streams(module.teacher_model)[2:4]]
            x, t = torch.cat(here), torch.cat(there)
            w = 1 / t.square().mean(-1, keepdim=True)
            a, b = (w * x).T @ x, (w * (t - x)).T @ x
            fit = method.equations(module, record, j).solve()
            change = torch.zeros_like(a)
            if fit is not None:
                bridged += 1
                change = b @ torch.linalg.inv(a + fit.strength * a.diagonal().mean() * torch.eye(len(a)))
                torch.testing.assert_close(fit.change.double(), change, rtol=1e-3, atol=1e-5)
            with torch.no_grad():
                hidden = stream_at(student, j, ids, attention_mask(mask))
                hidden = hidden + (hidden.double() @ change.T).float()
                final = student.run(ids, attention_mask(mask), start=j + 1, hidden=hidden)
                naive[j] = float(token_losses(student, final, ids, mask).sum() / targets_of(mask).sum())
        [chosen] = steps(module, method, 1)
        found = record.steps[-1].scores["loss_bridged"]
        assert chosen == naive.index(min(naive)) and found[chosen] == pytest.approx(naive[chosen], rel=1e-5)
        assert all(a == pytest.approx(b, rel=1e-5) or a == math.inf and b > min(naive) for a, b in zip(found, naive))
    assert bridged > 0
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_bridges_need_windows_of_their_own():
    with pytest.raises(ValueError, match="bridge 4: its windows follow those .* give --windows"):
        SLEB(bridge=4)
    with pytest.raises(ValueError, match="bridge -1"):
        SLEB(windows=1, bridge=-1)
    method = SLEB(windows=3, bridge=1)  # 3 are rounded up to both batches
    module = measured(tiny_model(layers=5), method)
    with pytest.raises(NoSite, match="bridge 1: no batch of calibration windows is left after those of --windows 3"):
        method(module, {}, module.record, remove=1)


@pytest.mark.parametrize("monitor", [1, 8])
def test_prune_comp_on_some_windows_looks_at_no_others(monitor: int):
    """Influence and compensation are those of a module that was given no others, and what is monitored adds nothing."""
    dense, found = tiny_model("llama", layers=6), []
    for few in (True, False):
        method = PruneComp(windows=1 if few else None)
        module = PruningModule(monitor=monitor)
        module.attach(dense, Record(6), needs=method.needs_for(Record(6)), span=method.span)
        module.pass_windows = method.pass_windows
        for left in (2, 1):
            for index in range(2 if few else 1):
                part = slice(2 * index, 2 * index + 2)
                module.training_step({"input_ids": IDS[part], "mask": MASK[part]}, index)
            decision = method(module, module.statistics.compute(), module.record, remove=left)
            module.do(decision.step)
            module.record.append(decision.step)
            module.needs = method.needs_for(module.record)
            module.monitor(ahead=True)
        found.append([(s.layers, s.scale, s.scores) for s in module.record.steps])
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="windows 0"):
        PruneComp(windows=0)


def test_barriers_that_leave_nothing():
    module = measured(tiny_model(layers=5), SLEB(barriers=2))
    with pytest.raises(NoSite, match="barriers 2 protect 4 layers, more than the 3"):
        SLEB(barriers=2)(module, {}, module.record, remove=2)
    with pytest.raises(ValueError, match="barriers -1"):
        SLEB(barriers=-1)


def test_a_loss_that_is_no_number_is_above_any(monkeypatch: pytest.MonkeyPatch):
    module = measured(tiny_model(), SLEB())
    losses = module._losses
    monkeypatch.setattr(module, "_losses", lambda look, start, **a: losses(look, start, **a) * (start or math.nan))
    assert module.loss(0) == module.loss(0, bound=9.0) == math.inf and module.loss(1) < 9.0
    assert SLEB(barriers=0)(module, {}, module.record, remove=1).step.layers != [0]


def test_sleb_without_a_finite_loss(monkeypatch: pytest.MonkeyPatch):
    module = measured(tiny_model(), SLEB())
    monkeypatch.setattr(PruningModule, "loss", lambda *a, **k: math.nan)
    with pytest.raises(NotFinite, match="without any layer"):
        SLEB()(module, {}, module.record, remove=1)


# -- magnitude and Taylor ----------------------------------------------------------------------------------------------


def by_hand(weights: list[Tensor], power: float, rows: str, block: str) -> float:
    reductions: dict[str, Any] = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "prod": math.prod}
    joined = []
    for weight in weights:
        table = weight.tolist() if weight.dim() == 2 else [[w] for w in weight.tolist()]
        joined.append(reductions[rows]([sum(abs(w) ** power for w in row) for row in table]))
    return reductions[block](joined)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen3", "opt"])
def test_magnitude_by_hand(family: str):
    model = tiny_model(family, layers=3)
    layers = Decoder(model).layers
    for layer in layers:
        names = {n for n, p in layer.named_parameters() if any(p is w for w in weights_of(layer))}
        assert all(n.endswith(("proj.weight", "norm.weight", "fc1.weight", "fc2.weight")) for n in names)
        assert names | {n for n in dict(layer.named_parameters()) if n.endswith("bias")} == set(
            dict(layer.named_parameters())
        )
    for power, rows, block in ((1, "sum", "sum"), (2, "mean", "max"), (1.5, "max", "mean")):
        method = Magnitude(power, rows, block)  # type: ignore[arg-type]
        module = measured(model, method)
        assert module.needs == frozenset() and module._states[0] is None, "no pass for a method that looks at weights"
        expected = [by_hand(weights_of(layer), power, rows, block) for layer in layers]
        assert list(method.score(module, {})) == pytest.approx(expected, rel=1e-6)
        order = sorted(range(3), key=lambda i: expected[i])
        assert dense_order(steps(module, method, 2), 3) == order[:2]


def test_products_stay_in_range():
    """A product of a thousand row sums is infinite in fp64; its logarithm orders layers all the same."""
    torch.manual_seed(0)
    tensors = [torch.rand(5, 4), torch.rand(3)]
    for rows, block in (("prod", "sum"), ("sum", "prod"), ("prod", "prod"), ("prod", "mean"), ("prod", "max")):
        found = Magnitude(1, rows, block).joined(tensors)  # type: ignore[arg-type]
        assert found == pytest.approx(math.log(by_hand(tensors, 1, rows, block)), rel=1e-6)
    small, large = (Magnitude(weight_reduction="prod").joined([torch.full((2000, 768), w)]) for w in (0.9, 1.0))
    assert small < large < math.inf
    assert math.isfinite(Magnitude(block_reduction="prod").joined([torch.zeros(4, 4), torch.ones(4)]))


def autograd_salience(model: Any) -> list[list[Tensor]]:
    """W ⊙ ∂L/∂W of every weight of every layer, from one plain backward pass a window, without padding."""
    model = copy.deepcopy(model).requires_grad_(True)
    count = int((MASK.sum(1) - 1).sum())
    for row, real in zip(IDS, MASK):
        row = row[real][None]
        (model(row, labels=row, use_cache=False).loss * (row.shape[1] - 1) / count).backward()
    layers = Decoder(model).layers
    return [[w.detach() * w.grad for w in weights_of(layer)] for layer in layers]  # type: ignore[operator]


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "opt", "opt-350m", "gemma2", "gemma3"])
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_taylor_is_the_signed_sum_over_batches(family: str, cache: str):
    model = tiny_model(family, layers=3)
    method = Taylor()
    module = measured(model, method, cache=cache)
    assert len(module.batches) == 2
    expected = autograd_salience(model)
    found = dict(method.salience(module))
    for layer, tensors in enumerate(expected):
        for one, other in zip(found[layer], tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    scores = list(method.score(module, {}))
    assert scores == pytest.approx([by_hand(t, 1, "sum", "sum") for t in expected], rel=1e-4)
    assert not any(p.requires_grad for p in module.student_model.parameters())
    # the absolute sum is another number: batches do cancel
    halves = []
    for index in range(2):
        module.batches, kept = [module.batches[index]], module.batches
        module._states, states = [module._states[index]], module._states
        halves.append(dict(method.salience(module)))
        module.batches, module._states = kept, states
    absolute = sum(by_hand(half[0], 1, "sum", "sum") for half in halves)
    assert absolute > scores[0] * 1.05


def test_only_one_layers_gradients_live(monkeypatch: pytest.MonkeyPatch):
    module = measured(tiny_model(layers=4), Taylor())
    alive: list[int] = []
    salience = Taylor().salience(module)
    for _ in salience:
        alive.append(sum(p.requires_grad or p.grad is not None for p in module.student_model.parameters()))
    assert alive == [0, 0, 0, 0]


def test_taylor_in_bfloat16_and_with_overflow():
    module = measured(tiny_model(layers=4).to(torch.bfloat16), Taylor())
    whole = measured(tiny_model(layers=4), Taylor())
    found, exact = (list(Taylor().score(m, {})) for m in (module, whole))
    assert found == pytest.approx(exact, rel=0.1)
    model = tiny_model(layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(NotFinite, match=r"taylor of layers \[.*2.*\] is not finite"):
        Taylor()(measured(model, Taylor()), {}, Record(4), remove=1)


@pytest.mark.parametrize("plus, plain", [(MagnitudePlus, Magnitude), (TaylorPlus, Taylor)])
def test_plus_holds_the_ends_back(plus: Any, plain: Any):
    model = tiny_model(layers=9)
    scores = list(plain().score(measured(model, plain()), {}))
    held = {0, 1, 2, 3, 7, 8}
    order = sorted(range(9), key=lambda i: (i in held, scores[i]))
    assert order[:3] != sorted(range(9), key=lambda i: scores[i])[:3], "the case tells the two apart"
    module = measured(model, plus())
    assert dense_order(steps(module, plus(), 5), 9) == order[:5]
    assert dense_order(steps(measured(model, plain()), plain(heuristic=True), 5), 9) == order[:5]
    assert dense_order(steps(measured(model, plus()), plus(heuristic=False), 5), 9) != order[:5]


@pytest.mark.parametrize("power", [0.0, -1.0, math.inf, math.nan])
def test_bad_powers(power: float):
    with pytest.raises(ValueError, match="norm_power"):
        Magnitude(norm_power=power)


# -- reverse -----------------------------------------------------------------------------------------------------------


def test_reverse_order():
    for retained, expected in (([], [5, 4, 3, 2, 1]), ([5, 3], [4, 2, 1, 0, 5]), ([0, 9 - 4], [4, 3, 2, 1, 5])):
        method = Reverse(retain_layer=retained)
        module = measured(tiny_model(layers=6), method)
        assert dense_order(steps(module, method, 5), 6) == expected
    with pytest.raises(ValueError, match="retain_layer 6: the model has layers 0 to 5"):
        steps(measured(tiny_model(layers=6), Reverse()), Reverse(retain_layer=[1, 6]), 1)


# -- Prune&Comp --------------------------------------------------------------------------------------------------------


def norm_inputs(model: Any) -> list[list[Tensor]]:
    """What each layer's first norm gives, a list a window."""
    decoder = Decoder(model)
    found = []
    for window in streams(model):
        with torch.no_grad():
            norms = [decoder.part(layer, decoder.family.attention_norm or "") for layer in decoder.layers]
            found.append([norm(stream.float()) for norm, stream in zip(norms, window)])
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "opt", "gemma", "gemma2", "gemma3"])
def test_prune_comp_scales_and_changes_no_earlier_layer(family: str):
    # a stream long enough that a norm's epsilon (1e-6 of its mean square) cannot be seen
    dense = tiny_model(family, layers=6)
    with torch.no_grad():
        dense.get_input_embeddings().weight.mul_(4)
    method = PruneComp()
    module = measured(dense, method)
    for _ in range(3):
        before = copy.deepcopy(module.student_model)
        state = streams(before)
        [dropped] = steps(module, method, 1)
        step = module.record.steps[-1]
        assert step.scores["block_influence"][dropped] == min(step.scores["block_influence"])
        above, below = (torch.cat([s[b].norm(dim=-1) for s in state]).mean() for b in (dropped + 1, dropped))
        assert step.scale == pytest.approx(float(above / below), rel=1e-5) and step.scale != 1
        after = streams(module.student_model)
        for old, new in zip(state, after):
            for boundary in range(dropped + 1):
                scaled = step.scale * old[boundary]
                assert (new[boundary] - scaled).norm() < 1e-5 * scaled.norm()
        if dropped:
            for old, new in zip(norm_inputs(before), norm_inputs(module.student_model)):
                for layer in range(dropped):
                    assert (new[layer] - old[layer]).norm() < 1e-5 * old[layer].norm()
        lengths = torch.cat([s[dropped].norm(dim=-1) for s in after]).mean()
        assert float(lengths) == pytest.approx(float(above), rel=1e-4), "as long as the next layer is used to"
    assert any(step.layers[0] for step in module.record.steps), "some layer had layers below it"
    embeddings = dense.get_input_embeddings().weight
    assert torch.equal(embeddings, module.teacher_model.get_input_embeddings().weight)


def test_the_influence_is_measured_on_the_compensated_student():
    dense = tiny_model(layers=6)
    module = measured(dense, PruneComp())
    steps(module, PruneComp(), 2)
    fresh = PruningModule()
    fresh.attach(module.student_model, Record(4), needs=PruneComp.needs, span=1)
    one_pass(fresh)
    found, expected = (m.statistics.compute()["block_influence"].tolist() for m in (module, fresh))
    assert found == expected


@pytest.mark.parametrize("name", DROPS)
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_every_method_can_be_compensated(name: str, cache: Any, tmp_path: Path):
    """The factor is that of the student as it is: its streams are run anew here, from the record alone."""
    dense = tiny_model(layers=LAYERS)
    module = prune(tmp_path, method=find(name)[1](compensate="magnitude"), model=dense, cache=cache)  # type: ignore[arg-type,call-arg]
    assert len(module.record.steps) == 3
    student = Decoder(surgery.share(dense))
    for step in module.record.steps:
        total = torch.zeros(2, dtype=torch.float64)
        for batch in module.batches:
            with torch.no_grad(), boundaries(student) as found:
                student.run(batch["input_ids"], attention_mask(batch["mask"]))
            for side, boundary in enumerate((step.layers[0] + 1, step.layers[0])):
                total[side] += found[boundary].norm(dim=-1)[batch["mask"]].sum()
        assert step.scale == pytest.approx(float(total[0] / total[1]), rel=1e-6)
        surgery.drop(student, step.layers[0])
        surgery.scale_stream(student, step.layers[0], step.scale)  # type: ignore[arg-type]
    state = module.student_model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in student.model.state_dict().items())


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", ["none", "magnitude"])
@pytest.mark.parametrize("name", DROPS)
def test_a_run_that_was_cut_off_gives_the_same_record(name: str, compensate: str, tmp_path: Path):
    method: Any = find(name)[1]
    whole = prune(tmp_path / "whole", method=method(compensate=compensate))
    prune(tmp_path / "half", method=method(compensate=compensate), trainer={"max_steps": 1})
    record = Record.read(tmp_path / "half" / "record.jsonl", LAYERS)
    assert len(record.steps) == 1
    half = prune(tmp_path / "half", method=method(compensate=compensate), record=record)
    assert lines(half) == lines(whole) and half.record.layers == 3
    states = [m.student_model.state_dict() for m in (whole, half)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    none = prune(tmp_path / "none", method=method(compensate=compensate), cache="none")
    assert [s.layers for s in none.record.steps] == [s.layers for s in whole.record.steps]
    for one, other in zip(none.record.steps, whole.record.steps):
        assert one.loss == pytest.approx(other.loss, rel=1e-6) and one.kl == pytest.approx(other.kl, rel=1e-5)


def test_a_tie_is_broken_alike_before_and_after_a_cut(tmp_path: Path):
    """A record holds eight digits; a run that goes on sees no more than that, and neither does one that was not cut."""

    class Close(ShortGPT):
        def score(self, *_: Any) -> list[float]:
            return [3.0, 0.5 + 2e-12, 1.0, 0.5 + 1e-12, 0.5, 2.0]

    whole = prune(tmp_path / "whole", method=Close())  # type: ignore[arg-type]
    prune(tmp_path / "half", method=Close(), trainer={"max_steps": 1})  # type: ignore[arg-type]
    half = prune(tmp_path / "half", method=Close(), record=Record.read(tmp_path / "half" / "record.jsonl", LAYERS))  # type: ignore[arg-type]
    assert lines(half) == lines(whole)
    assert dense_order([step.layers[0] for step in whole.record.steps], LAYERS) == [1, 3, 4]


def test_a_one_shot_order_is_the_records(tmp_path: Path):
    """Not that of the calibration text of the run that goes on."""
    prune(tmp_path, method=ShortGPT(), trainer={"max_steps": 1})  # type: ignore[arg-type]
    record = Record.read(tmp_path / "record.jsonl", LAYERS)
    first = record.steps[0]
    kept = [i for i in range(LAYERS) if i not in first.layers]
    worst = max(kept, key=lambda i: first.scores["block_influence"][i] or 0.0)
    first.scores["block_influence"][worst] = 0.0
    module = prune(tmp_path, method=ShortGPT(), record=record, target=4)  # type: ignore[arg-type]
    assert [kept[module.record.steps[1].layers[0]]] == [worst]


@pytest.mark.parametrize("name", ["shortgpt", "taylor", "magnitude", "reverse"])
def test_one_shot_methods_measure_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs: list[int] = []
    forward = PruningModule._forward

    def counted(self: PruningModule, *args: Any, **options: Any) -> Tensor:
        runs.append(len(self.student))
        return forward(self, *args, **options)

    monkeypatch.setattr(PruningModule, "_forward", counted)
    method: Any = find(name)[1]
    prune(tmp_path, method=method(), monitor=2)
    passes = 3 if name in ("shortgpt", "taylor") else 0  # batches; after a step only the monitored one is run
    assert [runs.count(depth) for depth in (6, 5, 4, 3)] == [passes, 1, 1, 1]


@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("first, second", [(1, 3), (3, 1), (0, 4)])
def test_two_steps_without_a_pass_between_them(first: int, second: int, scale: float | None):
    """The streams kept above the first are another student's, with a scale also those below it."""
    module = measured(tiny_model(layers=6), ShortGPT())
    module.do(Step("drop", [first], scale=scale))
    module.do(Step("drop", [second]))
    whole = PruningModule(cache="none")
    whole.attach(module.student_model, Record(4), needs=frozenset())
    one_pass(whole)
    assert module.monitor()[0] == whole.monitor()[0]
    assert module.loss(module.start) == whole.loss()
    for boundary in range(5):
        assert torch.equal(module.stream(0, boundary), whole.stream(0, boundary))


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, option, has",
    [
        ("--method sleb --granularity 5", "'sleb' has no option --method.granularity", "--method.barriers"),
        ("--method reverse --barriers 1", "'reverse' has no option --method.barriers", "--method.retain_layer"),
        ("--method come --compensate magnitude", "'come' has no option --method.compensate", "--method.rho"),
        ("--method prune_comp --angular", "'prune_comp' has no option --method.angular", "--method.compensate"),
        ("--method shortgpt --retain-layer 1 2", "'shortgpt' has no option --method.retain_layer", "--method.angular"),
        ("--method taylor --block-reduction median", "method.block_reduction", "median"),
        ("--method sleb --barriers -1", "barriers -1", "not negative"),
    ],
)
def test_options_that_a_method_has_not(
    arguments: str,
    option: str,
    has: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prune.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        prune_main()
    [line] = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and option in line and has in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--method sleb --barriers 0 --compensate magnitude", [[1], [0]]),
        ("--method reverse --retain-layer 5 4", [[3], [2]]),
        ("--method shortgpt --angular", None),
        ("--method taylor+ --weight-reduction mean --block-reduction max --norm-power 2 --heuristic", None),
        ("--method magnitude --heuristic", None),
    ],
)
def test_by_the_command_line(
    arguments: str, expected: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model, text = save_tiny(tmp_path / "tiny", layers=6), tiny_text(tmp_path / "text.txt")
    fixed = f"--model.path {model} --data.calibration {text} --evaluation.data {text} --output {tmp_path / 'run'} "
    fixed += "--target_layers 4 --data.tokens 256 --data.seqlen 32 --evaluation.tokens 256 "
    fixed += "--trainer.accelerator cpu --trainer.enable_progress_bar false "
    monkeypatch.setattr(sys, "argv", ["prune.py", *fixed.split(), *arguments.split()])
    prune_main()
    assert "6 → 4" in capsys.readouterr().out
    record = Record.read(tmp_path / "run" / "record.jsonl", 6)
    assert record.layers == 4 and (tmp_path / "run" / "importance.png").is_file()
    if "reverse" in arguments:
        assert [step.layers for step in record.steps] == expected
    if "compensate" in arguments:
        assert all(step.scale for step in record.steps)
    if "angular" in arguments:
        assert [len(step.layers) for step in record.steps] == [2]
