"""MKA, LaCo, ReplaceMe, LLM-Streamline and FuseGPT against brute force on tiny models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli import records, run
from conftest import save_tiny, tiny_ids, tiny_model, tiny_text
from lightning import LightningDataModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from come_pl.decoder import Decoder
from come_pl.pruning.loop import ProgressivePruning
from come_pl.pruning.methods import find, fusegpt
from come_pl.pruning.methods.base import Method, NoSite
from come_pl.pruning.methods.fusegpt import FuseGPT, divergence
from come_pl.pruning.methods.fusion import Fusion, folded, fusible
from come_pl.pruning.methods.laco import LaCo, coefficients
from come_pl.pruning.methods.mka import MKA, diffusion_map, entropy, mutual_information, npib, ranks
from come_pl.pruning.methods.replaceme import ReplaceMe, pairs
from come_pl.pruning.methods.streamline import Streamline
from come_pl.pruning.methods.training import generator, run_layers, usable
from come_pl.pruning.module import PruningModule
from come_pl.record import Record, Step, replay
from come_pl.surgery import drop

LAYERS, WINDOWS, SEQ = 6, 8, 12
IDS = tiny_ids(WINDOWS, SEQ)
MASK = torch.arange(SEQ) < torch.tensor([12, 8, 12, 5, 12, 12, 9, 12])[:, None]
FAMILIES = ("llama", "qwen3", "opt")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2")


def one_pass(module: PruningModule) -> None:
    for index in range(WINDOWS // 2):
        part = slice(2 * index, 2 * index + 2)
        module.training_step({"input_ids": IDS[part], "mask": MASK[part]}, index)


def measured(model: Any, method: Method, **options: Any) -> PruningModule:
    module = PruningModule(**options)
    module.attach(model, Record(len(Decoder(model))), needs=method.needs, span=method.span)
    one_pass(module)
    return module


def decide(module: PruningModule, method: Method, remove: int = 1) -> Step:
    return method(module, {}, module.record, remove=remove).step


def take(module: PruningModule, step: Step) -> None:
    module.do(step)
    module.record.append(step)
    one_pass(module)


def streams(model: Any) -> list[Tensor]:
    """Boundaries 0 … L of all windows, before the final norm, by plain hooks."""
    found: list[Tensor] = []
    layers = Decoder(model).layers
    handles = [layer.register_forward_pre_hook(lambda m, a: found.append(a[0])) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda m, a, o: found.append(o)))
    with torch.no_grad():
        model(IDS, attention_mask=MASK.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def is_norm(name: str) -> bool:
    return not any(p in name for p in PROJECTIONS)


# -- MKA ---------------------------------------------------------------------------------------------------------------


def test_diffusion_map_by_loops():
    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64)
    k = [[math.exp(-math.sqrt(math.dist(a, b) / 8)) for b in x.tolist()] for a in x.tolist()]
    p = [sum(row) for row in k]
    k = [[k[i][j] / math.sqrt(p[i] * p[j]) for j in range(7)] for i in range(7)]
    d = [sum(row) for row in k]
    u, _, _ = torch.linalg.svd(torch.tensor([[k[i][j] / math.sqrt(d[i] * d[j]) for j in range(7)] for i in range(7)]))
    expected = u[:, 1:3] / u[:, :1]
    found = diffusion_map(x)
    for column in range(2):
        sign = torch.sign((found[:, column] * expected[:, column]).sum())
        assert torch.allclose(found[:, column], sign * expected[:, column].double(), atol=1e-4)


def test_diffusion_map_finds_the_line():
    """Points on a line far apart: the first coordinate orders them."""
    x = torch.linspace(0, 40, 12)[:, None] * torch.tensor([[0.6, 0.8]])
    order = ranks(diffusion_map(x, sigma=8.0))[:, 0].tolist()
    assert order in (list(range(1, 13)), list(range(12, 0, -1)))


def test_information_by_hand():
    """Four samples in line, one neighbour: radius 1, nothing strictly inside but the sample itself, so ψ(4) + ψ(1) −
    2 ψ(1) = ψ(4) − ψ(1) = 1 + 1/2 + 1/3. Entropy: ψ(4) − ψ(1) + ln 2."""
    x = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    assert mutual_information(x, x, 1) == pytest.approx(11 / 6)
    assert mutual_information(x, -x, 1) == pytest.approx(11 / 6)
    assert entropy(x, 1) == pytest.approx(11 / 6 + math.log(2))
    two = torch.stack([x, x], 1)
    assert npib(two, two, 1, 1) == pytest.approx(11 / 6 / (11 / 6 + math.log(2)))
    torch.manual_seed(0)
    a, b = (torch.randperm(200).double() for _ in range(2))
    assert mutual_information(a, b, 5) < 0.1 < 1 < mutual_information(a, a + 0.1 * b, 5)
    assert ranks(torch.tensor([[0.3], [-1.0], [0.5]])).flatten().tolist() == [2, 1, 3]


def test_information_is_sklearns():
    feature_selection = pytest.importorskip("sklearn.feature_selection")
    torch.manual_seed(0)
    x = torch.randn(60, dtype=torch.float64)
    y = x + torch.randn(60, dtype=torch.float64)
    scaled = [v / v.std(correction=0) for v in (x, y)]
    expected = feature_selection.mutual_info_regression(x[:, None].numpy(), y.numpy(), n_neighbors=4)[0]
    assert mutual_information(*scaled, 4) == pytest.approx(float(expected), abs=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_mka_really_merges_the_last_two(family: str):
    dense = tiny_model(family, layers=LAYERS)
    module = measured(dense, MKA())
    first, second = (of(Decoder(dense).layers[i]) for i in (4, 5))
    step = decide(module, MKA(), remove=3)
    assert step.kind == "blend" and step.layers == [4, 5] and step.norm == "first" and step.ratio is not None
    shared = [float(s or 0) for s in step.scores["shared_information"]]
    r = shared[4] / (shared[4] + shared[5])
    assert (
        len(shared) == LAYERS and step.ratio[0] == pytest.approx(1 / (1 + math.exp(-r))) and 0.5 < step.ratio[0] < 0.74
    )
    take(module, step)
    assert len(module.student) == 5
    for name, value in of(module.student.layers[4]).items():
        expected = first[name] if is_norm(name) else step.ratio[0] * first[name] + step.ratio[1] * second[name]
        assert torch.allclose(value, expected, atol=1e-6), name
    again = decide(module, MKA(), remove=2)  # from the record's first step, not from the student as it is
    assert again.layers == [3, 4] and again.scores["shared_information"] == shared[:5]


def test_mka_options():
    dense = tiny_model(layers=LAYERS)
    fixed = decide(measured(dense, MKA()), MKA(lambda_override=0.62))
    assert fixed.ratio == [0.62, 1 - 0.62] and not fixed.scores
    ratios = {str(decide(measured(dense, m), m).ratio) for m in (MKA(), MKA(beta=3), MKA(num_tasks=4), MKA(sigma=0.5))}
    assert len(ratios) == 4
    module = PruningModule()
    module.attach(dense, Record(LAYERS), needs=())
    module.training_step({"input_ids": IDS[:4], "mask": MASK[:4]}, 0)
    with pytest.raises(ValueError, match="at least 8, not 4"):
        decide(module, MKA())


def test_mka_does_not_see_padding_or_batches():
    dense = tiny_model(layers=LAYERS)
    expected = MKA().shared_information(measured(dense, MKA()))
    module = PruningModule()
    module.attach(dense, Record(LAYERS), needs=())
    ids = torch.where(MASK, IDS, 7)
    for i in range(WINDOWS):
        module.training_step({"input_ids": ids[i : i + 1], "mask": MASK[i : i + 1]}, i)
    nothing = torch.zeros_like(MASK[:1])
    module.training_step({"input_ids": IDS[:1], "mask": nothing}, WINDOWS)
    assert MKA().shared_information(module) == pytest.approx(expected, rel=1e-6)


# -- LaCo --------------------------------------------------------------------------------------------------------------


def test_laco_coefficients():
    assert coefficients("released", 3) == [0, 0, 0, 1]
    assert coefficients("paper", 3) == [-2, 1, 1, 1] and sum(coefficients("paper", 3)) == 1
    assert coefficients("mean", 3) == [0.25] * 4
    assert coefficients("paper", 1) == coefficients("released", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_laco_released_keeps_the_last_projections_and_the_first_norms(family: str):
    dense = tiny_model(family, layers=LAYERS)
    module = measured(dense, LaCo(C=3))
    step = decide(module, LaCo(C=3), remove=2)
    module.do(step)
    first, last = (of(Decoder(dense).layers[step.layers[i]]) for i in (0, -1))
    merged = of(module.student.layers[step.layers[0]])
    assert len(step.layers) == 3 and step.ratio == [0, 0, 1]
    assert all(torch.equal(v, first[n] if is_norm(n) else last[n]) for n, v in merged.items())
    assert any(is_norm(n) and not torch.equal(first[n], last[n]) for n in merged)


def naive_laco(dense: Any, merge: Any, c: int, i: int, low: int, t: float | None, target: int) -> list[list[int]]:
    """The published loop with deep copies and full forwards; without a T, or below it, the best window."""
    count = Decoder(dense).config.num_hidden_layers

    def final(model: Any) -> list[Tensor]:
        with torch.no_grad():
            states = Decoder(model).base(input_ids=IDS, attention_mask=MASK.long(), use_cache=False).last_hidden_state
        return [state[real].flatten() for state, real in zip(states, MASK)]

    def candidate(model: Any, site: int, m: int) -> Any:
        new = copy.deepcopy(model)
        layers = Decoder(new).layers
        with torch.no_grad():
            parts = [dict(layer.named_parameters()) for layer in layers[site : site + m + 1]]
            for name, base in layers[site].named_parameters():
                if is_norm(name):
                    continue
                dense_part, total = base.clone(), base.clone()
                for k in range(1, m + 1):
                    total += parts[k][name] - (total if merge == "released" else dense_part)
                base.copy_(total)
        for _ in range(m):
            drop(Decoder(new), site + 1)
        return new

    def similarity(model: Any) -> float:
        pairs = zip(final(model), reference)
        return sum(float(F.cosine_similarity(a.double(), b.double(), dim=0)) for a, b in pairs) / WINDOWS

    reference, model, taken = final(dense), dense, []
    site = count - c
    while count > target:
        m, chosen = 0, None
        full = min(c - 1, count - target)
        while t is not None and site >= low:
            m = min(full, count - site - 1)
            if similarity(candidate(model, site, m)) > t:
                chosen = site
                break
            site -= 1
        if chosen is None:
            m = full
            found = {s: similarity(candidate(model, s, m)) for s in range(low, count - m)}
            chosen = max(found, key=lambda s: found[s])
        model = candidate(model, chosen, m)
        taken.append(list(range(chosen, chosen + m + 1)))
        count, site = count - m, chosen - i
    return taken


@pytest.mark.parametrize(
    "family, merge, c, i, low, t",
    [
        ("llama", "released", 3, 1, 0, 0.9),
        ("llama", "released", 3, 2, 1, 0.6),
        ("llama", "paper", 2, 1, 0, 0.8),
        ("llama", "paper", 4, 1, 0, None),
        ("qwen3", "released", 3, 1, 0, None),
        ("opt", "released", 4, 1, 0, 0.5),
    ],
)
def test_laco_decides_as_the_naive_search(family: str, merge: Any, c: int, i: int, low: int, t: float | None):
    dense = tiny_model(family, layers=7)
    method = LaCo(merge=merge, C=c, I=i, L=low, T=t)
    module, target = measured(dense, method), 3
    steps = []
    while module.record.layers > target:
        steps.append(decide(module, method, remove=module.record.layers - target))
        take(module, steps[-1])
    assert [step.layers for step in steps] == naive_laco(dense, merge, c, i, low, t, target)
    assert module.record.layers == target


def test_laco_threshold_and_first_windows():
    dense = tiny_model(layers=LAYERS)
    low, none = LaCo(C=2, T=-1.0), LaCo(C=2)
    assert decide(measured(dense, low), low, remove=2).layers == [4, 5], "everything passes: the first window"
    best = decide(measured(dense, none), none, remove=2)
    scores = [float(s or 0) for s in best.scores["final_similarity"]]
    assert best.layers[0] == max(range(5), key=lambda s: scores[s]) and len(scores) == 5
    high = decide(measured(dense, none), LaCo(C=2, T=0.99999), remove=2)
    assert high.layers == best.layers, "nothing passes: T is lowered to the best"
    under = LaCo(C=2, T=-1.0, H=5)
    assert decide(measured(dense, under), under, remove=2).layers == [3, 4]
    few = decide(measured(dense, none), LaCo(C=2, windows=2), remove=2)
    assert few.scores != best.scores
    with pytest.raises(NoSite, match="L=5"):
        decide(measured(dense, none), LaCo(L=5), remove=2)


# -- ReplaceMe ---------------------------------------------------------------------------------------------------------


def stacked(dense: Any, cut: int, count: int) -> tuple[Tensor, Tensor]:
    """(MLP output, target) of all counted tokens, fp64, by plain hooks on the dense model."""
    decoder, found = Decoder(dense), []
    part = decoder.part(decoder.layers[cut - 1], decoder.family.mlp_output)
    handle = part.register_forward_hook(lambda m, a, o: found.append(o))
    h = streams(dense)
    handle.remove()
    m = found[0].reshape(*MASK.shape, -1)
    return m[MASK].double(), (h[cut + count] - (h[cut] - m))[MASK].double()


@pytest.mark.parametrize("family", [*FAMILIES, "llama-biases", "gemma"])
def test_replaceme_is_least_squares_folded(family: str):
    dense = tiny_model(family, layers=LAYERS)
    method = ReplaceMe()
    module = measured(dense, method)
    step = decide(module, method, remove=2)
    h = streams(dense)
    last = MASK.sum(1) - 1
    ends = [x[torch.arange(WINDOWS), last] for x in h]
    angles = [float(F.cosine_similarity(ends[i], ends[i + 2]).arccos().mean()) for i in range(5)]
    cut = min(range(1, 5), key=lambda i: angles[i])
    assert step.kind == "drop" and step.layers == [cut, cut + 1] and step.scores["angular_distance"][0] is None
    m, target = stacked(dense, cut, 2)
    t = torch.linalg.lstsq(m, target).solution
    assert torch.allclose(method.least_squares(module, cut - 1, 2), t, atol=1e-5, rtol=1e-4)
    module.do(step)
    output = streams(module.student_model)[cut][MASK].double()
    stream_without_mlp = h[cut][MASK].double() - m
    assert torch.allclose(output, stream_without_mlp + m @ t, atol=1e-4)
    assert torch.linalg.norm(output - h[cut + 2][MASK]) < torch.linalg.norm(h[cut][MASK] - h[cut + 2][MASK])
    changed = [
        n
        for n, v in of(module.student.layers[cut - 1]).items()
        if not torch.equal(v, of(Decoder(dense).layers[cut - 1])[n])
    ]
    assert {n.rpartition(".")[0] for n in changed} == {module.student.family.mlp_output}


def test_replaceme_ridge_too_few_tokens_and_cosine():
    dense = tiny_model(layers=LAYERS)
    module = measured(dense, ReplaceMe())
    m, target = stacked(dense, 2, 2)
    a = m.T @ m
    ridge = torch.linalg.solve(a + 0.5 * a.diagonal().mean() * torch.eye(32), m.T @ target)
    assert torch.allclose(ReplaceMe(ridge=0.5).least_squares(module, 1, 2), ridge, atol=1e-5)
    few = PruningModule()
    few.attach(dense, Record(LAYERS), needs=ReplaceMe.needs)
    few.training_step({"input_ids": IDS[:2], "mask": MASK[:2]}, 0)
    m, target = (x.double() for x in pairs(few, 0, 1, 2))
    assert len(m) < 32
    expected = torch.linalg.pinv(m, rtol=1e-6) @ target  # two first tokens are the same
    assert torch.allclose(ReplaceMe().least_squares(few, 1, 2), expected, atol=1e-4)

    def distance(t: Tensor) -> float:
        m, target = stacked(dense, 2, 2)
        return float(1 - F.cosine_similarity(m @ t, target, dim=1).mean())

    learned = ReplaceMe("cosine", lr=1e-2, epochs=15).cosine(module, 1, 2)
    assert distance(learned) < 0.8 * distance(torch.eye(32, dtype=torch.float64))
    assert torch.equal(ReplaceMe("cosine", epochs=0).cosine(module, 1, 2), torch.eye(32, dtype=torch.float64))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt-350m"])
def test_replaceme_refuses_output_norms(family: str):
    method = ReplaceMe()
    with pytest.raises(ValueError, match="norm stands between"):
        decide(measured(tiny_model(family), method), method)


def test_replaceme_needs_a_layer_before_the_cut():
    method = ReplaceMe()
    module = measured(tiny_model(layers=3), method)
    assert decide(module, method, remove=2).layers == [1, 2]
    with pytest.raises(NoSite):
        decide(module, method, remove=3)


# -- LLM-Streamline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streamline_trains_one_layer(family: str):
    dense = tiny_model(family, layers=LAYERS)
    before = of(dense)
    method = Streamline(epochs=8, lr=5e-3)
    module = measured(dense, method)
    torch.manual_seed(3)
    step = decide(module, method, remove=2)
    h = streams(dense)
    turns = [float(1 - F.cosine_similarity(h[i], h[i + 3], dim=-1)[MASK].mean()) for i in range(4)]
    assert step.scores["window_distance"] == pytest.approx(turns, abs=1e-6)
    first = step.layers[0]
    assert first == min(range(4), key=lambda i: turns[i]) and len(step.layers) == 3 and step.ratio == [1, 0, 0]
    losses = [float(x or 0) for x in step.scores["training_loss"]]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]

    def error(module: PruningModule) -> float:
        return float((streams(module.student_model)[first + 1] - h[first + 3])[MASK].square().mean())

    untrained = measured(dense, method)
    untrained.do(decide(untrained, Streamline(epochs=0), remove=2))
    assert all(
        torch.equal(v, of(Decoder(dense).layers[first])[n]) for n, v in of(untrained.student.layers[first]).items()
    )
    module.do(step)
    assert error(module) < losses[0] < error(untrained), "the first epoch learns already"
    assert step.layers_with_weights == [first]
    kept = [*range(first), *range(first + 3, LAYERS)]
    others = [layer for i, layer in enumerate(module.student.layers) if i != first]
    for source, layer in zip(kept, others, strict=True):
        assert all(p is q for p, q in zip(layer.parameters(), Decoder(dense).layers[source].parameters()))
    assert all(torch.equal(v, before[n]) for n, v in of(dense).items()), "the dense model stays whole"
    assert not any(p.requires_grad for p in module.student_model.parameters())


@pytest.mark.parametrize("loss", ["mse", "lm"])
def test_streamline_is_deterministic_and_lm_lowers_the_loss(loss: Any):
    dense, found = tiny_model(layers=LAYERS), []
    method = Streamline(loss=loss, epochs=6, lr=3e-3)
    for seed in (3, 3, 4):
        module = measured(dense, method)
        torch.manual_seed(seed)
        step = decide(module, method, remove=2)
        found.append(step)
        torch.randn(5)  # what else draws random numbers does not matter
    weights = [step.weights for step in found]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not all(torch.equal(weights[0][n], weights[2][n]) for n in weights[0])
    if loss == "lm":
        plain, trained = measured(dense, method), measured(dense, method)
        plain.do(decide(plain, Streamline(epochs=0), remove=2))
        trained.do(found[0])
        assert trained.loss() < plain.loss()
        assert plain.loss() == pytest.approx(float(found[0].scores["training_loss"][0] or 0), rel=0.3)


@pytest.mark.parametrize("method", [Streamline(epochs=2), FuseGPT(epochs=2, group_size=4)])
def test_training_without_a_cache_is_the_same(method: Method):
    dense, found = tiny_model(layers=LAYERS), []
    for cache in ("ram", "none"):
        torch.manual_seed(0)
        found.append(decide(measured(dense, method, cache=cache), method).weights)
    assert all(torch.allclose(v, found[1][n], atol=1e-6) for n, v in found[0].items())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", [Streamline(epochs=1), Streamline("lm", epochs=1), FuseGPT(epochs=1, group_size=4)])
def test_half_precision(family: str, method: Method):
    dense = tiny_model(family, layers=LAYERS).bfloat16()
    module = measured(dense, method)
    step = decide(module, method)
    assert {v.dtype for v in step.weights.values()} == {torch.bfloat16}
    module.do(step)
    assert math.isfinite(module.loss())


def test_a_loss_that_is_not_finite_is_said():
    method = Streamline(lr=1e30, epochs=3, clip=0)
    with pytest.raises(ValueError, match="not finite"):
        decide(measured(tiny_model(layers=LAYERS), method), method)


# -- FuseGPT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fusegpt_without_training_is_a_drop(family: str):
    dense = tiny_model(family, layers=LAYERS)
    method = FuseGPT(epochs=0)
    module = measured(dense, method)
    full = streams(dense)[-1]
    expected = []
    for layer in range(LAYERS):
        without = copy.deepcopy(dense)
        drop(Decoder(without), layer)
        expected.append(float(1 - F.cosine_similarity(full, streams(without)[-1], dim=-1)[MASK].mean()))
    step = decide(module, method)
    assert step.scores == {"macro_influence": pytest.approx(expected, rel=1e-4)}
    chosen = min(range(LAYERS), key=lambda i: expected[i])
    assert step.kind == "drop" and step.layers == [chosen] and step.weights is None
    few = decide(module, FuseGPT(epochs=0, windows=2))
    assert few.scores != step.scores


@pytest.mark.parametrize("family, fused", [("llama", 0), ("llama", 3), ("llama", 7), ("qwen3", 4), ("opt", 2)])
def test_fusegpt_learns_and_folds(family: str, fused: int, monkeypatch: pytest.MonkeyPatch):
    dense = tiny_model(family, layers=8)
    method = FuseGPT(group_size=4, epochs=6, lr=1e-3, coef_lr=1e-2, lora_rank=4, coef_rank=4)
    module = measured(dense, method)
    monkeypatch.setattr(FuseGPT, "influence", lambda *a: [float(i != fused) for i in range(8)])
    nets: list[Any] = []
    monkeypatch.setattr(fusegpt, "fusible", lambda *a: nets.append(fusible(*a)) or nets[-1])
    step = decide(module, method)
    first = max(min(fused - 2, 4), 0)
    group = [i for i in range(first, first + 4) if i != fused]
    assert list(nets[0]) == [str(i) for i in group] and step.layers == [fused]
    assert step.layers_with_weights == [i - (i > fused) for i in group]
    losses = [float(x or 0) for x in step.scores["training_loss"]]
    assert losses[-1] < losses[0]

    def group_loss() -> float:
        target = streams(dense)[first + 4]
        output = streams(module.student_model)[first + 3]
        return float(divergence(output, target, MASK, -1)[0] / MASK.sum())

    dropped = Step("drop", [fused])
    module.do(dropped)
    plain = group_loss()
    module = measured(dense, method)
    take(module, step)
    assert group_loss() < plain
    # what was folded is what the layers that were trained compute
    for place, layer in nets[0].items():
        student = module.student.layers[int(place) - (int(place) > fused)]
        for name, value in student.named_parameters():
            owner, _, attribute = name.rpartition(".")
            assert torch.equal(value, getattr(layer.get_submodule(owner), attribute)), name
        other = of(Decoder(dense).layers[int(place)])
        assert any(not torch.equal(v, other[n]) for n, v in student.named_parameters())


def test_fusion_by_hand():
    torch.manual_seed(0)
    weight, fused = torch.randn(5, 3), torch.randn(5, 3)
    fusion = Fusion(fused, (2, 16), torch.Generator().manual_seed(0))
    assert torch.equal(fusion(weight), weight), "nothing at first"
    assert fusion.A.shape == (2, 3) and fusion.C1.shape == (5, 3) and fusion.A.any() and fusion.C2.any()
    with torch.no_grad():
        for p in fusion.parameters():
            p.copy_(torch.randn_like(p))
    expected = weight + fusion.B @ fusion.A + (fusion.C1 @ fusion.C2) * fused
    assert torch.allclose(fusion(weight), expected)


def test_divergence_over_channels_and_over_windows():
    torch.manual_seed(0)
    output, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    whole = torch.ones(2, 3, dtype=torch.bool)
    expected = F.kl_div(output.log_softmax(0), target.softmax(0), reduction="batchmean")  # the released line
    total, count = divergence(output, target, whole, 0)
    assert float(total / count) == pytest.approx(float(expected))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    hurt = output.masked_fill(~mask[..., None], 1e4)
    for dim in (-1, 0):
        total, count = divergence(output, target, mask, dim)
        assert float(divergence(hurt, target, mask, dim)[0]) == pytest.approx(float(total)), "padding does not count"
        assert int(count) == (3 if dim == -1 else 2)
    each = F.kl_div(output.log_softmax(-1), target.softmax(-1), reduction="none").sum(-1)
    assert float(divergence(output, target, mask, -1)[0]) == pytest.approx(float(each[mask].sum()))


def test_run_layers_is_the_models_own_forward():
    dense = tiny_model("gemma3", layers=LAYERS)
    module = measured(dense, FuseGPT())
    decoder, h = Decoder(dense), streams(dense)
    batch = usable(module.batches[0])
    some = {i: decoder.layers[i] for i in (2, 3, 4)}
    assert torch.allclose(run_layers(decoder, some, batch, h[2][:2]), h[5][:2], atol=1e-5)
    some.pop(3)
    skipped = run_layers(decoder, some, batch, h[2][:2])
    without = copy.deepcopy(dense)
    Decoder(without).base.layers[3].forward = lambda hidden_states, *a, **k: hidden_states  # type: ignore[assignment]
    assert torch.allclose(skipped, streams(without)[5][:2], atol=1e-5)


def test_kl_over_windows_needs_some():
    module = PruningModule()
    module.attach(tiny_model(), Record(4), needs=FuseGPT.needs)
    module.training_step({"input_ids": IDS[:1], "mask": MASK[:1]}, 0)
    with pytest.raises(ValueError, match="batch_size"):
        decide(module, FuseGPT(kl_dim=0))
    assert decide(measured(tiny_model(), FuseGPT()), FuseGPT(kl_dim=0, epochs=1)).weights


def test_folding_leaves_what_was_not_trained_alone():
    module = measured(tiny_model("llama-biases"), FuseGPT())
    net = fusible(module.student, range(1, 4), 2, (4, 4), generator(module.record))
    names = folded(module.student, {int(i): layer for i, layer in net.items()}, 2)
    assert not any(n.endswith("bias") for n in names) and {n[0] for n in names} == {"1", "2"}
    trained = {n.rpartition(".")[2] for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {"A", "B", "C1", "C2", "weight"}


# -- whole runs --------------------------------------------------------------------------------------------------------


class Windows(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader([{"input_ids": i, "mask": m} for i, m in zip(IDS, MASK)], batch_size=2)  # type: ignore[arg-type]


RUNS: dict[str, Callable[[], Method]] = {
    "mka": MKA,
    "laco": lambda: LaCo(C=3, merge="mean"),
    "laco_T": lambda: LaCo(C=2, T=0.7, I=1),
    "replaceme": ReplaceMe,
    "replaceme_cosine": lambda: ReplaceMe("cosine", epochs=2),
    "streamline": lambda: Streamline(epochs=2),
    "streamline_lm": lambda: Streamline("lm", epochs=2),
    "fusegpt": lambda: FuseGPT(group_size=4, epochs=2),
}


def prune(folder: Path, method: Method, dense: Any, *, record: Record | None = None, **trainer: Any) -> PruningModule:
    module = PruningModule()
    folder.mkdir(exist_ok=True)
    record = record or Record(LAYERS, folder / "record.jsonl")
    module.attach(dense, record, needs=method.needs, span=method.span)
    settings: dict[str, Any] = {"max_epochs": -1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    settings |= {"enable_model_summary": False, "enable_progress_bar": False, "default_root_dir": folder}
    Trainer(callbacks=[ProgressivePruning(method, 3)], **(settings | trainer)).fit(module, Windows())
    return module


@pytest.mark.parametrize("family, name", [*(("llama", n) for n in RUNS), ("qwen3", "fusegpt"), ("opt", "streamline")])
def test_runs_reach_their_depth_replay_and_resume(tmp_path: Path, family: str, name: str):
    dense = tiny_model(family, layers=LAYERS)
    torch.manual_seed(1)
    module = prune(tmp_path / "whole", RUNS[name](), dense)
    assert module.record.layers == len(module.student) == 3
    expected = module.student_model.state_dict()
    again = replay(Record.read(tmp_path / "whole" / "record.jsonl", LAYERS), dense)
    assert all(torch.equal(v, expected[n]) for n, v in again.state_dict().items())
    for step in module.record.steps:
        assert math.isfinite(step.loss) and math.isfinite(step.kl)
    # interrupted after its first step and gone on with
    torch.manual_seed(1)
    prune(tmp_path / "half", RUNS[name](), dense, max_steps=1)
    record = Record.read(tmp_path / "half" / "record.jsonl", LAYERS)
    torch.manual_seed(1)
    resumed = prune(tmp_path / "half", RUNS[name](), dense, record=record) if record.layers > 3 else None
    if resumed is not None:
        assert [s.layers for s in resumed.record.steps] == [s.layers for s in module.record.steps]
        found = resumed.student_model.state_dict()
        assert all(torch.allclose(v, expected[n], atol=1e-6) for n, v in found.items())
    # a stock checkpoint
    module.student_model.save_pretrained(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert loaded.config.num_hidden_layers == 3
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, module.student_model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        *[
            ("mka", o)
            for o in ({"lambda_override": 1.2}, {"num_tasks": 0}, {"sigma": 0.0}, {"beta": -1}, {"alpha": -1})
        ],
        *[("laco", o) for o in ({"merge": "last"}, {"C": 1}, {"I": 0}, {"L": -1}, {"H": 1}, {"T": -2}, {"windows": 0})],
        *[("replaceme", o) for o in ({"solver": "adam"}, {"ridge": -1}, {"epochs": -1}, {"lr": math.nan})],
        *[("streamline", o) for o in ({"loss": "kl"}, {"epochs": -1}, {"lr": -1}, {"clip": -1}, {"weight_decay": -1})],
        *[("fusegpt", o) for o in ({"kl_dim": 1}, {"group_size": 1}, {"coef_rank": 0}, {"windows": 0}, {"epochs": -1})],
    ],
)
def test_values_that_are_refused(name: str, options: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(options))):
        find(name)[1](**options)


@pytest.mark.parametrize("name, more", [("streamline", ("--method.epochs", 2)), ("mka", ("--num-tasks", 4))])
def test_two_processes_give_what_one_gives(tmp_path: Path, name: str, more: tuple[object, ...]):
    dense, text, found = save_tiny(tmp_path / "dense", layers=LAYERS), tiny_text(tmp_path / "text.txt", 8000), []
    for devices, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(devices)
        arguments = ["--method", name, *more, "--model.path", dense, "--output", folder, "--target_layers", 4]
        arguments += ["--data.calibration", text, "--evaluation.data", text, "--data.tokens", 512]
        arguments += ["--data.seqlen", 32, "--evaluation.tokens", 256, "--data.batch_size", batch]
        result = run("prune.py", *arguments, "--trainer.devices", devices, "--trainer.accelerator", "cpu", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found.append((records(folder), load_file(folder / "model" / "model.safetensors")))
    (steps, weights), (others, other_weights) = found
    assert [s["layers"] for s in steps] == [s["layers"] for s in others]
    assert all(torch.allclose(v, other_weights[n], atol=1e-5) for n, v in weights.items())
