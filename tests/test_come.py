"""CoMe and CoMe-P against their formulas by hand, and against naive searches that build every candidate."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import tiny_ids, tiny_model
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning.methods import UnknownMethod, find
from come_pl.pruning.methods.come import CoMe, NoSite, distribute, keep, merge_ratio, sensitivity, top
from come_pl.pruning.methods.come_p import CoMeP
from come_pl.pruning.module import PruningModule
from come_pl.record import Record, apply
from come_pl.surgery import Kept, concatenate, dominant, replace_span, share

IDS = tiny_ids(4, 12)
MASK = torch.arange(12) < torch.tensor([12, 8, 12, 5])[:, None]


def released(**changes: Any) -> CoMe:
    """CoMe with the defaults of the released code."""
    return CoMe(**({"rho": 0.0, "wo_repeat": False, "span_tokens": "last"} | changes))


def measured(model: Any, method: CoMe) -> PruningModule:
    module = PruningModule()
    module.attach(model, Record(len(Decoder(model))), needs=method.needs, span=method.span)
    one_pass(module)
    return module


def one_pass(module: PruningModule) -> None:
    for index in range(2):
        part = slice(2 * index, 2 * index + 2)
        module.training_step({"input_ids": IDS[part], "mask": MASK[part]}, index)


def decide(module: PruningModule, method: CoMe, remove: int = 3, **statistics: Any) -> Any:
    found = module.statistics.compute()
    found |= {name: torch.tensor(v, dtype=torch.float64) for name, v in statistics.items()}
    return method(module, found, module.record, remove=remove)


def take(module: PruningModule, decision: Any) -> None:
    module.do(decision.step, decision.layer)
    module.record.append(decision.step)
    one_pass(module)


def naive_loss(model: Any) -> float:
    """transformers' own loss, a window at a time, unpadded."""
    nats, count = 0.0, 0
    with torch.no_grad():
        for row, real in zip(IDS, MASK):
            row = row[real][None]
            nats += float(model(row, labels=row, use_cache=False).loss) * (row.shape[1] - 1)
            count += row.shape[1] - 1
    return nats / count


def rebuilt(model: Any, layers: list[torch.nn.Module], types: list[str] | None = None) -> Any:
    """A separate model of these layers, made without surgery."""
    model = copy.deepcopy(model)
    base = model.get_decoder()
    base = base if hasattr(base, "layers") else base.decoder
    base.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    model.config.num_hidden_layers = base.config.num_hidden_layers = len(layers)
    if types:
        model.config.layer_types = types
    return model


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_ratio_is_the_share_of_influence():
    assert merge_ratio([1.0, 3.0], 2) == [0.25, 0.75]
    assert merge_ratio([1.0, 3.0], 2, p=2) == pytest.approx([0.1, 0.9])
    assert merge_ratio([1.0, 3.0], 2, p=0) == [0.5, 0.5]
    assert merge_ratio([1.0, 2.0, 5.0], 3) == pytest.approx([0.125, 0.25, 0.625])


@pytest.mark.parametrize("originals, floor", [(2, 0.5), (3, 0.7071), (4, 0.7937), (5, 0.8409)])
def test_floor_grows_with_the_group(originals: int, floor: float):
    """The table of METHODS.md: rho = .5 gives .5, .71, .79, .84 for n = 2 … 5."""
    assert merge_ratio([1.0, 1.0], originals, rho=0.5) == pytest.approx([floor, 1 - floor], abs=1e-4)
    assert merge_ratio([0.4, 0.6], originals, rho=0.5)[1] == pytest.approx(max(floor, 0.6), abs=1e-4)
    assert merge_ratio([9.0, 1.0], originals, rho=0.5) == pytest.approx([0.9, 0.1]), "above the floor: left alone"


def test_floor_of_three_layers():
    ratio = merge_ratio([1.0, 2.0, 1.0], 3, rho=0.64)
    assert ratio == pytest.approx([0.1, 0.8, 0.1])
    assert merge_ratio([1.0, 2.0], 2, rho=1.0) == [0.0, 1.0]


def test_large_exponents_and_no_influence():
    assert merge_ratio([1e-12, 2e-12], 2, p=32) == pytest.approx([2**-32, 1 - 2**-32])
    assert merge_ratio([1e-300, 1e-3], 2, p=32) == [0.0, 1.0]
    assert merge_ratio([0.0, 0.0], 2) == [0.5, 0.5]
    assert merge_ratio([0.0, 0.0, 0.0], 3, p=32) == pytest.approx([1 / 3] * 3)
    assert merge_ratio([0.0, 0.0], 3, rho=0.81) == pytest.approx([0.9, 0.1])
    assert merge_ratio([0.0, 1e-9], 2) == [0.0, 1.0]


@pytest.mark.parametrize(
    "ratio, total, expected",
    [
        ([0.25, 0.75], 10, [2, 8]),
        ([0.5, 0.5], 3, [2, 1]),
        ([0.3, 0.7], 10, [3, 7]),
        ([0.29, 0.71], 100, [29, 71]),
        ([0.4, 0.35, 0.25], 7, [4, 2, 1]),
        ([0.1, 0.9], 2, [0, 2]),
        ([0.0, 1.0], 5, [0, 5]),
    ],
)
def test_distribute(ratio: list[float], total: int, expected: list[int]):
    assert distribute(ratio, total) == expected


def test_top():
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])
    assert top(scores, 2) == (0, 2) and top(scores, 4) == (0, 2, 3, 4) and top(scores, 0) == ()


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_sensitivity_by_loops(family: str):
    decoder = Decoder(tiny_model(family))
    shape, layer = decoder.geometry, decoder.layers[2]
    channels = shape.heads * shape.head_dim
    torch.manual_seed(0)
    statistics = {"attention": torch.rand(4, channels).double(), "mlp": torch.rand(4, 48).double()}
    with torch.no_grad():
        heads, neurons = sensitivity(decoder, 2, statistics)
    out = layer.get_submodule(decoder.family.attention_output).weight.tolist()
    down = layer.get_submodule(decoder.family.mlp_output).weight.tolist()
    for c in range(48):
        expected = float(statistics["mlp"][2, c]) * sum(abs(row[c]) for row in down)
        assert float(neurons[c]) == pytest.approx(expected, rel=1e-5)
    n_rep = shape.heads // shape.kv_heads
    for kv in range(shape.kv_heads):
        total = 0.0
        for head in range(shape.heads):
            if head // n_rep == kv:
                for c in range(head * shape.head_dim, (head + 1) * shape.head_dim):
                    total += float(statistics["attention"][2, c]) * sum(abs(row[c]) for row in out)
        assert float(heads[kv]) == pytest.approx(total / (n_rep * shape.head_dim), rel=1e-5)


def test_kept_channels_are_each_layers_most_sensitive():
    decoder = Decoder(tiny_model("llama", gqa=False))
    torch.manual_seed(0)
    statistics = {"attention": torch.rand(4, 32).double(), "mlp": torch.rand(4, 48).double()}
    kept = keep(decoder, [1, 2], [0.3, 0.7], statistics)
    assert [len(k.kv_heads) for k in kept] == [1, 3] and [len(k.neurons) for k in kept] == [14, 34]
    for layer, k in zip((1, 2), kept):
        heads, neurons = (s.tolist() for s in sensitivity(decoder, layer, statistics))
        for chosen, scores in ((k.kv_heads, heads), (k.neurons, neurons)):
            others = [s for i, s in enumerate(scores) if i not in chosen]
            assert list(chosen) == sorted(chosen) and min(scores[i] for i in chosen) >= max(others)


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_site_is_where_the_span_is_shortest(tokens: Any):
    method = released(rho=0.0, span_tokens=tokens)
    module = measured(tiny_model(layers=6), method)
    other = {"last": "all", "all": "last"}[tokens]
    spans = {f"span_{tokens}": [0.3, 0.2, 0.15, 0.1, 0.4], f"span_{other}": [0.0, 1, 1, 1, 1]}
    step = decide(module, method, block_influence=[9.0, 9, 9, 1, 3, 9], **spans).step
    assert step.kind == "merge" and step.layers == [3, 4] and step.ratio == [0.25, 0.75]
    assert step.kept == keep(module.student, [3, 4], [0.25, 0.75], module.statistics.compute())
    assert step.scores == {"block_influence": [9, 9, 9, 1, 3, 9], "span_distance": spans[f"span_{tokens}"]}
    assert step.norm == "mean"


def test_the_floor_knows_how_many_dense_layers_are_inside():
    method = released(rho=0.5)
    module = measured(tiny_model(layers=6), method)
    even: dict[str, Any] = {"block_influence": [1.0] * 6, "span_last": [0.9, 0.1, 0.9, 0.9, 0.9]}
    first = decide(module, method, **even)
    assert first.step.ratio == [0.5, 0.5]
    take(module, first)
    second = decide(module, method, block_influence=[1.0] * 5, span_last=[0.9, 0.1, 0.9, 0.9])
    assert second.step.layers == [1, 2] and second.step.ratio == pytest.approx([0.5**0.5, 1 - 0.5**0.5])
    take(module, second)
    third = decide(module, method, block_influence=[1.0] * 4, span_last=[0.1, 0.9, 0.9])
    assert third.step.layers == [0, 1] and third.step.ratio == pytest.approx([0.5 ** (1 / 3), 1 - 0.5 ** (1 / 3)])


def test_wo_repeat_leaves_merged_layers_alone():
    method = released(wo_repeat=True)
    module = measured(tiny_model(layers=6), method)
    # the released code's index out of range: the last pair was merged
    first = decide(module, method, span_last=[0.9, 0.9, 0.9, 0.9, 0.0])
    assert first.step.layers == [4, 5]
    take(module, first)
    second = decide(module, method, span_last=[0.5, 0.4, 0.3, 0.0])
    assert second.step.layers == [2, 3]
    assert second.step.scores["span_distance"] == [0.5, 0.4, 0.3, math.inf]
    take(module, second)
    third = decide(module, method, span_last=[0.5, 0.0, 0.0])
    assert third.step.layers == [0, 1]
    take(module, third)
    assert module.record.groups == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(NoSite, match="at 3 layers.*wo_repeat false"):
        decide(module, method)
    assert decide(module, released(), span_last=[0.5, 0.0]).step.layers == [1, 2]


def test_three_at_a_time_and_a_smaller_last_step():
    method = released(merge_item=3)
    assert method.span == 3
    module = measured(tiny_model("llama", gqa=False, layers=6), method)
    full = decide(module, method, remove=3, span_last=[0.4, 0.1, 0.3, 0.2])
    assert full.step.layers == [1, 2, 3] and len(full.step.kept) == 3
    assert sum(full.step.ratio) == pytest.approx(1)
    take(module, full)
    assert len(module.student) == 4
    last = decide(module, method, remove=1, span_last_2=[0.3, 0.2, 0.1], span_last=[0.0, 0.0])
    assert last.step.layers == [2, 3] and len(last.step.kept) == 2
    take(module, last)
    assert module.record.groups == [[0], [1, 2, 3], [4, 5]]


def test_mka_takes_the_last_layers():
    """The released code's slip merges layers 0 and 1."""
    for item, expected in ((2, [4, 5]), (3, [3, 4, 5])):
        method = released(skip_method="mka", merge_item=item)
        module = measured(tiny_model(layers=6), method)
        assert decide(module, method).step.layers == expected
    method = released(skip_method="mka", wo_repeat=True)
    module = measured(tiny_model(layers=6), method)
    for expected in ([4, 5], [2, 3], [0, 1]):
        decision = decide(module, method)
        assert decision.step.layers == expected
        take(module, decision)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_sleb_sites_are_those_of_really_removed_layers(family: str):
    dense = tiny_model(family, layers=5)
    method = released(skip_method="sleb")
    module = measured(dense, method)
    for _ in range(2):
        decision = decide(module, method)
        layers = list(module.student.layers)
        naive = [naive_loss(rebuilt(dense, layers[:i] + layers[i + 2 :])) for i in range(len(layers) - 1)]
        assert decision.step.scores["loss_without"] == pytest.approx(naive, rel=1e-5)
        assert decision.step.layers[0] == naive.index(min(naive)) and max(naive) > min(naive) * 1.001
        take(module, decision)


# -- CoMe-P ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, first", [("llama", 1), ("qwen2-mixed", 0), ("qwen2-mixed", 1), ("gemma3", 2)])
def test_come_p_finds_what_building_every_model_finds(family: str, first: int):
    """Also where a sliding layer is merged with a full one: the candidate runs with the attention it will have."""
    dense = tiny_model(family, layers=5)
    method = CoMeP(granularity=8)
    module = measured(dense, method)
    span = [0.9] * 4
    span[first] = 0.1
    decision = decide(module, method, span_all=span)
    statistics, naive = module.statistics.compute(), []
    for tick in range(9):
        student = Decoder(share(dense))
        ratio = [tick / 8, 1 - tick / 8]
        layers = [student.layers[first], student.layers[first + 1]]
        new = concatenate(student, layers, keep(student, [first, first + 1], ratio, statistics), ratio)
        replace_span(student, first, 2, new, first + dominant(ratio))
        naive.append(naive_loss(student.model))
    best = naive.index(min(naive))
    assert decision.step.layers == [first, first + 1]
    assert decision.step.ratio == [best / 8, 1 - best / 8]
    found: list[float] = decision.step.scores["ratio_loss"]
    assert found[best] == pytest.approx(naive[best], rel=1e-5)
    for loss, expected in zip(found, naive):
        assert loss == pytest.approx(expected, rel=1e-5) or (loss == math.inf and expected > naive[best])
    # the layer that was built for the search is the one that the record's replay builds
    replayed = Decoder(share(dense))
    apply(decision.step, replayed)
    built = decision.layer.state_dict()
    assert all(torch.equal(value, built[name]) for name, value in replayed.layers[first].state_dict().items())
    module.do(decision.step, decision.layer)
    assert module.loss() == pytest.approx(naive[best], rel=1e-5)


def test_giving_up_early_changes_no_choice(monkeypatch: pytest.MonkeyPatch):
    loss = PruningModule.loss
    given_up: list[bool] = []
    choices = []
    for patient in (False, True):

        def patched(self: PruningModule, *args: Any, patient: bool = patient, **options: Any) -> float:
            if patient:
                options.pop("bound", None)
            found = loss(self, *args, **options)
            given_up.append(found == math.inf)
            return found

        monkeypatch.setattr(PruningModule, "loss", patched)
        for seed in range(4):
            method = CoMeP(granularity=10)
            module = measured(tiny_model(layers=4, seed=seed), method)
            step = decide(module, method).step
            choices.append((step.layers, step.ratio, step.kept))
    assert choices[:4] == choices[4:] and any(given_up)
    assert len({tuple(ratio) for _, ratio, _ in choices}) > 1


def test_come_p_with_losses_that_are_not_numbers(monkeypatch: pytest.MonkeyPatch):
    method = CoMeP(granularity=4)
    module = measured(tiny_model(), method)
    monkeypatch.setattr(PruningModule, "loss", lambda *a, **k: math.nan)
    decision = decide(module, method, block_influence=[1.0, 1, 1, 1])
    assert decision.layer is None and decision.step.ratio == [0.5, 0.5]


@pytest.mark.parametrize("options", [{"merge_item": 1}, {"rho": 1.2}, {"rho": -0.1}, {"p": -1.0}, {"p": math.nan}])
def test_bad_options(options: Any):
    with pytest.raises(ValueError, match=next(iter(options))):
        released(**options)
    with pytest.raises(ValueError, match="granularity"):
        CoMeP(granularity=0)


def test_names():
    assert find("come") == ("come", CoMe) and find("concat_merge") == ("come", CoMe)
    assert find("concat_merge_P") == ("come_p", CoMeP)
    with pytest.raises(UnknownMethod, match="did you mean 'come_p'"):
        find("come-p")


def test_kept_is_ascending_in_a_real_decision():
    module = measured(tiny_model(), released())
    kept: list[Kept] = decide(module, released()).step.kept
    counts: list[Tensor] = [torch.tensor(k.neurons) for k in kept]
    assert sum(len(c) for c in counts) == 48 and all((c.diff() > 0).all() for c in counts)


def test_merged_layers_are_merged_again_only_when_nothing_else_is_left():
    method = CoMe()
    module = measured(tiny_model(layers=4), method)
    flat: dict[str, Any] = {"block_influence": [1.0] * 4}
    first = decide(module, method, **flat, span_all=[0.1, 0.2, 0.3])
    assert first.step.layers == [0, 1]
    take(module, first)
    second = decide(module, method, block_influence=[1.0] * 3, span_all=[0.1, 0.2])
    assert second.step.layers == [1, 2]  # not the shorter span, which holds the merged layer
    take(module, second)
    third = decide(module, method, block_influence=[1.0] * 2, span_all=[0.1])
    assert third.step.layers == [0, 1]  # nothing else is left
