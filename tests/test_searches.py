"""What searches cost, in forwards of decoder layers counted by hooks, and that cheaper ones choose the same."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_come import IDS, MASK, decide, measured, naive_loss, one_pass, rebuilt, take

from benchmarks.cost import counted
from come_pl.decoder import Decoder
from come_pl.pruning.methods.base import Decision
from come_pl.pruning.methods.come import CoMe, keep
from come_pl.pruning.methods.come_p import CoMeP, best, first_stride, least, most_tried
from come_pl.pruning.methods.fusegpt import FuseGPT
from come_pl.pruning.methods.laco import LaCo
from come_pl.pruning.methods.sleb import SLEB
from come_pl.pruning.module import PruningModule
from come_pl.pruning.race import Race, clearly_worse
from come_pl.record import Record
from come_pl.surgery import concatenate, dominant, reindex

TOKENS = IDS.numel()
BATCHES = 2
SPAN = {"span_all": [0.9, 0.9, 0.1, 0.9, 0.9]}  # of six layers: the site is 2


def searched(search: Any, seed: int = 0, granularity: int = 20, **options: Any) -> tuple[PruningModule, Decision]:
    """The decision at layers 2 and 3 of six."""
    method = CoMeP(granularity=granularity, search=search, **options)
    module = measured(tiny_model(layers=6, seed=seed), method)
    return module, decide(module, method, **SPAN)


def chosen_by_copies(module: PruningModule, granularity: int, norm: Any = "mean") -> tuple[int, list[float]]:
    """(best point, the loss of each) of whole models copied for each candidate, each run from the embeddings."""
    statistics, losses = module.statistics.compute(), []
    for tick in range(granularity + 1):
        ratio = [tick / granularity, 1 - tick / granularity]
        student = Decoder(copy.deepcopy(module.student_model))
        layers = list(student.layers)
        new = concatenate(student, layers[2:4], keep(student, [2, 3], ratio, statistics), ratio, norm)
        student.base.layers = torch.nn.ModuleList([*layers[:2], new, *layers[4:]])
        reindex(student, [0, 1, 2 + dominant(ratio), 4, 5])
        whole = PruningModule(cache="none")
        whole.attach(student.model, Record(5), needs=frozenset())
        one_pass(whole)
        losses.append(whole.loss())
    return losses.index(min(losses)), losses


# -- CoMe-P ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", ["mean", "fold"])
def test_full_search_is_the_naive_one_bit_for_bit(seed: int, norm: str):
    module, decision = searched("full", seed, norm=norm)
    point, losses = chosen_by_copies(module, 20, norm)
    step = decision.step
    assert step.layers == [2, 3] and step.ratio == [point / 20, 1 - point / 20]
    assert step.kept == keep(module.student, [2, 3], step.ratio, module.statistics.compute())
    found = step.scores["ratio_loss"]
    assert found[point] == losses[point]
    for one, other in zip(found, losses, strict=True):
        assert one == other or (one == math.inf and other > losses[point])
    layers = [module.student.layers[i] for i in (2, 3)]
    expected = concatenate(module.student, layers, step.kept, step.ratio, norm).state_dict()  # type: ignore[arg-type]
    assert decision.layer is not None
    assert all(torch.equal(value, expected[name]) for name, value in decision.layer.state_dict().items())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularity", [1, 7, 20, 40])
def test_coarse_search_finds_a_local_minimum_in_few_attempts(seed: int, granularity: int):
    module, decision = searched("coarse", seed, granularity)
    found = decision.step.scores["ratio_loss"]
    tried = [i for i, loss in enumerate(found) if loss is not None]
    assert len(found) == granularity + 1 and len(tried) <= most_tried(granularity)
    _, losses = chosen_by_copies(module, granularity)
    assert decision.step.ratio is not None
    point = round(decision.step.ratio[0] * granularity)
    assert found[point] == losses[point] == min(losses[i] for i in tried)
    for neighbour in {max(point - 1, 0), min(point + 1, granularity)}:
        assert neighbour in tried and losses[point] <= losses[neighbour]


def test_how_many_points_are_tried():
    assert [first_stride(g) for g in (1, 4, 9, 10, 20, 39, 40)] == [1, 1, 1, 2, 4, 4, 8]
    assert [most_tried(g) for g in (1, 9, 10, 20, 40)] == [2, 10, 8, 10, 12]


@pytest.mark.parametrize("share", [0.0, 0.31, 1.0])
@pytest.mark.parametrize("lowest", range(21))
def test_any_expectation_finds_the_same(share: float, lowest: int):
    """A bowl with its least value at a point of the grid; the first of equals where it is flat."""
    bowl = [abs(point - lowest) // 2 + 1.0 for point in range(21)]
    for search in ("full", "coarse"):
        tried: list[int] = []

        def loss(point: int, bound: float, tried: list[int] = tried) -> float:
            tried.append(point)
            return bowl[point] if bowl[point] <= bound else math.inf

        found = least(loss, 20, share, search)  # type: ignore[arg-type]
        assert sorted(tried) == sorted(set(tried)) == sorted(found)
        assert bowl[best(found)] == 1.0
        if search == "full":
            assert best(found) == bowl.index(1.0) and len(tried) == 21
        else:
            assert len(tried) <= most_tried(20) == 10


def test_equal_candidates_are_told_apart_by_the_grid():
    """More points than neurons: neighbouring points build the same layer, and the first of them is taken."""
    for seed in range(2):
        module, decision = searched("full", seed, granularity=60)
        point, losses = chosen_by_copies(module, 60)
        assert len(set(losses)) < 61 and decision.step.ratio == [point / 60, 1 - point / 60]


def test_the_bound_is_exact_where_losses_are_equal():
    module, _ = searched("full")
    for start in range(6):
        loss = module.loss(start, skip=[start])
        assert module.loss(start, skip=[start], bound=loss) == loss
        assert module.loss(start, skip=[start], bound=math.nextafter(loss, 0)) == math.inf


def test_come_p_runs_only_the_merged_layer_and_those_above():
    runs = {}
    for search in ("full", "coarse"):
        method = CoMeP(search=search)  # type: ignore[arg-type]
        module = measured(tiny_model(layers=6), method)
        with counted(module.student_model, TOKENS) as cost:
            step = decide(module, method, **SPAN).step
        candidates = [loss for loss in step.scores["ratio_loss"] if loss is not None]
        given_up = candidates.count(math.inf)
        # the merged layer, 4 and 5, of both batches; of the first at least
        least_runs, most_runs = 3 * (2 * len(candidates) - given_up), 3 * 2 * len(candidates)
        assert least_runs <= cost.layer_runs <= most_runs
        assert cost.layer_tokens <= len(candidates) * 3 * TOKENS
        assert cost.passes == pytest.approx(cost.layer_tokens / (6 * TOKENS))
        runs[search] = cost.layer_runs
    assert runs["coarse"] < runs["full"] < 21 * 5 * BATCHES, "a naive search runs all five layers for 21 candidates"


def test_bad_search():
    with pytest.raises(ValueError, match="search 'fine': expected one of full, coarse"):
        CoMeP(search="fine")  # type: ignore[arg-type]


# -- SLEB, LaCo, FuseGPT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sleb_runs_only_what_is_above_and_chooses_as_the_naive_search(family: str):
    method = SLEB()
    dense = tiny_model(family, layers=7)
    module = measured(dense, method)  # type: ignore[arg-type]
    given_up = 0
    for _ in range(4):
        depth = len(module.student)
        naive = [math.inf] * depth
        layers, types = list(module.student.layers), getattr(module.student.config, "layer_types", None)
        for j in range(1, depth - 1):
            kept = None if types is None else types[:j] + types[j + 1 :]
            whole = PruningModule(cache="none")
            whole.attach(rebuilt(dense, layers[:j] + layers[j + 1 :], kept), Record(depth - 1), needs=frozenset())
            one_pass(whole)
            naive[j] = whole.loss()
        with counted(module.student_model, TOKENS) as cost:
            decision = method(module, {}, module.record, remove=1)
        assert decision.step.layers == [naive.index(min(naive))]
        found = decision.step.scores["loss_without"]
        expected = 0
        for j in range(1, depth - 1):
            assert found[j] == naive[j] or (found[j] == math.inf and naive[j] > min(naive))
            expected += (depth - 1 - j) * BATCHES  # layers above the one that is skipped
        given_up += found[1:-1].count(math.inf)
        assert cost.layer_runs <= expected < (depth - 2) * (depth - 1) * BATCHES
        take(module, decision)
    assert given_up > 0


def test_slebs_order_begins_with_what_was_best_to_spare():
    method, record = SLEB(), Record(6)
    assert method.order(record) == [4, 3, 2, 1]
    module = measured(tiny_model(layers=6), method)  # type: ignore[arg-type]
    decision = method(module, {}, module.record, remove=1)
    decision.step.layers, decision.step.scores = [2], {"loss_without": [math.inf, 3.0, 2.0, None, 2.5, math.inf]}
    take(module, decision)
    assert method.order(module.record) == [3, 1, 2]  # of losses inf 3.0 None 2.5 inf
    decision.step.scores = {}
    assert method.order(module.record) == [3, 2, 1]


def test_laco_runs_the_original_once_and_candidates_from_their_window_up():
    method = LaCo(C=3)
    module = measured(tiny_model(layers=6), method)  # type: ignore[arg-type]
    for step, original in ((0, 6), (1, 0)):
        depth = len(module.student)
        with counted(module.student_model, TOKENS) as cost:
            decision = method(module, {}, module.record, remove=2)
        candidates = depth - 2
        suffixes = sum(depth - 2 - site for site in range(candidates))
        assert cost.layer_runs == (original + suffixes) * BATCHES, step
        assert suffixes < candidates * (depth - 2), "whole models have layers below their windows"
        take(module, decision)
    with counted(module.student_model, TOKENS) as cost:
        one_pass_again = measured(tiny_model(layers=6, seed=3), method)  # type: ignore[arg-type]
        before = cost.layer_runs
        method(one_pass_again, {}, one_pass_again.record, remove=2)
        assert cost.layer_runs - before == (6 + 10) * BATCHES, "another model has another original"


def test_fusegpts_influence_runs_only_what_is_above():
    module = measured(tiny_model(layers=6), FuseGPT())  # type: ignore[arg-type]
    with counted(module.student_model, TOKENS) as cost:
        found = FuseGPT().influence(module)
    assert cost.layer_runs == sum(range(6)) * BATCHES < 6 * 5 * BATCHES and cost.head_tokens == 0
    dense, naive = Decoder(module.teacher_model), []
    for skip in ((), *((layer,) for layer in range(6))):
        states: list[torch.Tensor] = []
        handle = dense.base.norm.register_forward_pre_hook(lambda m, args, states=states: states.append(args[0]))
        with torch.inference_mode():
            dense.run(IDS, MASK.long(), skip=skip)
        handle.remove()
        naive.append(states[0][MASK])
    expected = [1 - torch.cosine_similarity(naive[0], without, dim=-1).mean() for without in naive[1:]]
    assert found == pytest.approx([float(e) for e in expected], rel=1e-4, abs=1e-7)


def test_the_counter_counts_whoever_runs():
    model = tiny_model(layers=4)
    with counted(model, TOKENS) as cost:
        naive_loss(copy.deepcopy(model))
    real = int(MASK.sum())
    assert cost.layer_runs == 4 * len(IDS) and cost.layer_tokens == 4 * real and cost.head_tokens == real
    assert cost.passes == pytest.approx(real / TOKENS) and cost.head_passes == pytest.approx(real / TOKENS)
    naive_loss(model)
    assert cost.layer_runs == 4 * len(IDS), "nothing is counted outside"


# -- races -------------------------------------------------------------------------------------------------------------


def test_the_clearly_worse_are_told_by_paired_differences():
    """Against the formula in plain Python; what does not count may be anything."""
    generator, told_apart = torch.Generator().manual_seed(0), set[tuple[bool, bool]]()
    for _ in range(20):
        counted_tokens = torch.rand(90, generator=generator) > 0.3
        base = torch.rand(90, generator=generator, dtype=torch.float64) * 5
        noise = torch.randn(6, 90, generator=generator, dtype=torch.float64) * 0.7
        values = base + noise + torch.tensor([[0.0], [0.1], [0.2], [0.4], [0.0], [0.0]])
        values[4], values[5] = math.nan, base.mean() + 0.3  # one that is no number, and a constant
        values[:, ~counted_tokens] = math.nan
        rows = [[v for v, c in zip(row, counted_tokens.tolist(), strict=True) if c] for row in values.tolist()]
        means = [math.inf if math.isnan(sum(row)) else sum(row) / len(row) for row in rows]
        best = means.index(min(means))
        leader, lost, above = clearly_worse(values, counted_tokens, lambda t: t, 3.0)
        assert leader == best and not lost[best] and above[best] == 0 and lost[4] and above[4] == math.inf
        for candidate in {0, 1, 2, 3, 5} - {best}:
            d = [a - b for a, b in zip(rows[candidate], rows[best], strict=True)]
            mean = sum(d) / len(d)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / len(d))
            assert above[candidate] == pytest.approx(mean)
            assert lost[candidate] == (mean > 3.0 * deviation / math.sqrt(len(d)))
            lenient = clearly_worse(values, counted_tokens, lambda t: t, 3.0, close=0.15)[1]
            assert lenient[candidate] == (mean + 0.15 > 3.0 * deviation / math.sqrt(len(d)))
            told_apart.add((lost[candidate], lenient[candidate]))
    assert told_apart == {(False, False), (False, True), (True, True)}
    assert clearly_worse(torch.full((2, 3), math.nan), torch.ones(3, dtype=torch.bool), lambda t: t)[0] == 0


def test_processes_race_as_one():
    """Two processes, each with half of the tokens, and one with all."""
    values = torch.randn(4, 60, dtype=torch.float64) + torch.arange(4)[:, None] * 0.3
    counted_tokens, sums = torch.rand(60) > 0.2, list[torch.Tensor]()
    whole = clearly_worse(values, counted_tokens, lambda t: t, 2.0)

    def all_reduce(own: torch.Tensor, other: list[torch.Tensor]) -> torch.Tensor:
        return own + other.pop(0)

    def halves(part: slice, total: Any) -> Any:
        return clearly_worse(values[:, part], counted_tokens[part], total, 2.0)

    first, second = slice(0, 25), slice(25, 60)
    for part, rest in ((first, second), (second, first)):
        sums.clear()
        # what the other process adds: its sums, and those of differences to the common leader
        own = torch.where(counted_tokens[rest], values[:, rest], 0.0)
        sums.append(torch.cat([own.sum(1), counted_tokens[rest].sum().double()[None]]))
        differences = own - own[whole[0]]
        sums.append(torch.stack([differences.sum(1), differences.square().sum(1)]))
        found = halves(part, lambda t: all_reduce(t, sums))
        assert found[:2] == whole[:2] and found[2] == pytest.approx(whole[2])


def test_candidates_run_side_by_side_until_one_is_left():
    """Three looks: one candidate is far worse, one a little, two are equal."""
    offsets, ran = [0.5, 0.0, 9.0, 0.0], list[tuple[int, int]]()
    base = torch.randn(3, 2, 50)

    def measure(candidate: int, look: Any) -> torch.Tensor:
        ran.append((candidate, look[0]))
        noise = torch.Generator().manual_seed(100 * (candidate % 2) + look[0])
        return base[look[0]] + offsets[candidate] + torch.randn(2, 50, generator=noise)

    looks = [(index, slice(None)) for index in range(3)]
    race = Race(measure, looks, lambda look: torch.ones(2, 50, dtype=torch.bool), lambda t: t, errors=5.0)
    assert race.best([2, 0, 1]) == 1 and race.winner == 1
    assert [c for c in ran if c[0] == 2] == [(2, 0)], "given up after the first look"
    assert {c for c in ran if c[0] == 1} >= {(1, 0)} and race.above[1] == 0
    assert 8 < race.above[2] < 10 and race.above[0] == pytest.approx(0.5, abs=0.4)
    del ran[:]
    assert race.best([3, 1]) == 1, "the lowest of equals"
    assert {c for c, _ in ran} <= {3, 1} and (1, 0) not in ran, "what was measured before is not measured again"
    assert [look for c, look in ran if c == 3] == [0, 1, 2] and race.above[3] == 0
    losses = torch.cat([race._losses[3][k] for k in range(3)])
    assert race.mean(3) == pytest.approx(float(losses.mean()), rel=1e-6)
    offsets.append(-2.0)
    assert race.best([1, 4]) == 4 and race.above[1] == pytest.approx(2.0, abs=0.4)
    assert race.above[2] == pytest.approx(11, abs=1), "all that were ever given up are told against the last winner"


def test_a_race_measures_what_loss_does():
    """Each window once, in any looks."""
    module = measured(tiny_model(layers=6), CoMe())
    race = module.race(lambda layer: {"start": layer, "skip": [layer]})
    assert race.best([4]) == 4 and len(race._losses[4]) == 1, "a single one need not be measured further"
    race.errors = math.inf
    with counted(module.student_model, TOKENS) as cost:
        winner = race.best([3, 4])
    for layer in (3, 4):
        assert race.mean(layer) == pytest.approx(module.loss(layer, skip=[layer]), rel=1e-6)
    assert race.above[7 - winner] == pytest.approx(race.mean(7 - winner) - race.mean(winner), abs=1e-6)
    assert cost.layer_tokens == (2 * TOKENS) + TOKENS - int(module.part((0, slice(0, 1)))["mask"].sum())


@pytest.mark.parametrize("errors", [math.inf, 4.0, 0.0])
@pytest.mark.parametrize("method", [CoMeP(race=True), SLEB(race=True)])
def test_a_race_finds_what_the_search_does(method: Any, errors: float, monkeypatch: pytest.MonkeyPatch):
    """With no error allowed, whatever is above the best after the first window is given up."""
    statistics = SPAN if isinstance(method, CoMe) else {}
    name = "ratio_loss" if isinstance(method, CoMe) else "loss_without"
    found = {}
    for raced in (False, True):
        method.race = raced
        monkeypatch.setattr("come_pl.pruning.module.ERRORS", errors)
        module = measured(tiny_model(layers=6, seed=1), method)
        with counted(module.student_model, TOKENS) as cost:
            step = decide(module, method, remove=1, **statistics).step
        found[raced] = (step.layers, step.ratio, step.scores[name], cost.layer_tokens)
    exact, race = found[False], found[True]
    if errors > 0:
        assert race[:2] == exact[:2]
    if errors == math.inf:
        assert min(race[2]) == pytest.approx(min(exact[2]), rel=1e-6)
    if errors == 0:
        assert race[3] < exact[3] / 2 and max(race[2][1:-1]) < math.inf, "each ran, if only on one window"


@pytest.mark.parametrize("seed", range(3))
def test_a_coarse_race_does_not_tell_close_ratios_apart(seed: int):
    """What it chooses is no more than `close` above its neighbours, and the closer it looks, the more it runs."""
    found = []
    for close in (0.0, 0.03, 100.0):
        method = CoMeP(search="coarse", race=True, close=close)
        module = measured(tiny_model(layers=6, seed=seed), method)
        with counted(module.student_model, TOKENS) as cost:
            step = decide(module, method, **SPAN).step
        _, losses = chosen_by_copies(module, 20)
        assert step.ratio is not None
        point, tried = round(step.ratio[0] * 20), [loss for loss in step.scores["ratio_loss"] if loss is not None]
        beside = [losses[i] for i in (point - 1, point + 1) if 0 <= i <= 20]
        assert losses[point] <= min(beside) + close and min(tried) == step.scores["ratio_loss"][point]
        found.append((cost.layer_tokens, len(tried)))
    exact, near, any_ratio = found
    assert exact[0] > near[0] > any_ratio[0]
    # the merged layer, 4 and 5, of the first window alone
    assert any_ratio[0] == any_ratio[1] * 3 * IDS.shape[1]


def test_bad_close():
    for close in (-0.01, math.nan, math.inf):
        with pytest.raises(ValueError, match="close .*: nats a token, 0 or more"):
            CoMeP(search="coarse", race=True, close=close)
    for idle in ({"search": "full", "race": True}, {"search": "coarse"}):
        with pytest.raises(ValueError, match="close 0.1: .* needs search coarse, race true"):
            CoMeP(close=0.1, **idle)  # type: ignore[arg-type]
