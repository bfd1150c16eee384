"""Statistics, losses and perplexity against loops over tokens written out by hand, and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, VOCABULARY, tiny_ids, tiny_model
from torch import Tensor

from come_pl import taps
from come_pl.decoder import Decoder, attention_mask
from come_pl.evaluation.perplexity import perplexity
from come_pl.pruning.methods.come import CoMe
from come_pl.pruning.module import PruningModule
from come_pl.record import Record, Step
from come_pl.taps import LayerStatistics, boundaries, projection_inputs

LENGTHS = (12, 7, 12, 1, 9)


def padded(lengths: tuple[int, ...] = LENGTHS, seq: int = 12) -> tuple[Tensor, Tensor]:
    """(ids, mask) of windows padded on the right, as data.py pads them."""
    mask = torch.arange(seq) < torch.tensor(lengths)[:, None]
    return tiny_ids(len(lengths), seq).where(mask, 1), mask


def collect(decoder: Decoder, ids: Tensor, mask: Tensor, batch: int = 2, span: int = 2) -> dict[str, Tensor]:
    """Statistics by the package, in batches."""
    shape = decoder.geometry
    statistics = LayerStatistics(len(decoder), span, (shape.heads * shape.head_dim, shape.ffn))
    with torch.inference_mode():
        for i in range(0, len(ids), batch):
            real = mask[i : i + batch]
            with (
                boundaries(decoder) as states,
                projection_inputs(decoder, 0, lambda k, n, x: statistics.add_channels(k, n, x, real)),  # noqa: B023
            ):
                decoder.run(ids[i : i + batch], attention_mask(real))
            statistics.update(states, real)
    return statistics.compute()


def brute_force(decoder: Decoder, windows: list[Tensor], span: int = 2) -> dict[str, Tensor]:
    """The same from each window alone and unpadded, a token and a channel at a time, in Python floats."""
    depth, shape = len(decoder), decoder.geometry
    influence, spans_all = [0.0] * depth, [0.0] * (depth - span + 1)
    spans_last = [0.0] * (depth - span + 1)
    intensity = {
        "attention": [[0.0] * (shape.heads * shape.head_dim) for _ in range(depth)],
        "mlp": [[0.0] * shape.ffn for _ in range(depth)],
    }
    tokens = 0
    for window in windows:
        seen: dict[Any, Tensor] = {}
        handles = []
        for index, layer in enumerate(decoder.layers):

            def stream(m: Any, args: Any, kwargs: Any, output: Any, index: int = index, seen: Any = seen) -> None:
                seen[index] = args[0] if args else kwargs["hidden_states"]
                seen[index + 1] = output if isinstance(output, Tensor) else output[0]

            handles.append(layer.register_forward_hook(stream, with_kwargs=True))
            for kind, path in (
                ("attention", decoder.family.attention_output),
                ("mlp", decoder.family.mlp_output),
            ):

                def channels(m: Any, args: Any, key: Any = (kind, index), seen: Any = seen) -> None:
                    seen[key] = args[0]

                handles.append(layer.get_submodule(path).register_forward_pre_hook(channels))
        with torch.no_grad():
            decoder.model(window[None])
        for handle in handles:
            handle.remove()
        for t in range(len(window)):
            tokens += 1
            h = [seen[b].reshape(len(window), -1)[t].double().tolist() for b in range(depth + 1)]

            def cos(a: list[float], b: list[float]) -> float:
                dot = sum(x * y for x, y in zip(a, b))
                return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

            for index in range(depth):
                influence[index] += 1 - min(max(cos(h[index], h[index + 1]), 0), 1)
                for kind, rows in intensity.items():
                    x = seen[kind, index].reshape(len(window), -1)[t].tolist()
                    for c, value in enumerate(x):
                        rows[index][c] += abs(value)
            for index in range(depth - span + 1):
                distance = math.acos(min(max(cos(h[index], h[index + span]), -1), 1)) / math.pi
                spans_all[index] += distance
                if t == len(window) - 1:
                    spans_last[index] += distance
    found = {"block_influence": influence, "span_all": spans_all, **intensity}
    result = {name: torch.tensor(value, dtype=torch.float64) / tokens for name, value in found.items()}
    result["span_last"] = torch.tensor(spans_last, dtype=torch.float64) / len(windows)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_by_hand_and_padding_does_not_count(family: str):
    """Invariants 5 and 8: padded batches give what the windows give alone, unpadded."""
    decoder = Decoder(tiny_model(family))
    ids, mask = padded()
    expected = brute_force(decoder, [row[real] for row, real in zip(ids, mask)])
    found = collect(decoder, ids, mask)
    assert found["tokens"].tolist() == [sum(LENGTHS)] * len(decoder)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    whole = collect(decoder, ids, torch.ones_like(mask))
    assert not torch.allclose(whole["block_influence"], found["block_influence"], rtol=1e-3)


def test_spans_of_every_size():
    decoder = Decoder(tiny_model("llama", layers=6))
    ids, mask = padded()
    found = collect(decoder, ids, mask, span=4)
    for size in (2, 3, 4):
        expected = brute_force(decoder, [row[real] for row, real in zip(ids, mask)], span=size)
        suffix = "" if size == 4 else f"_{size}"
        for name in ("span_all", "span_last"):
            torch.testing.assert_close(found[name + suffix], expected[name], rtol=2e-5, atol=1e-6)


def test_last_boundary_is_before_the_final_norm():
    """Invariant 5."""
    model = tiny_model("llama")
    decoder = Decoder(model)
    with torch.no_grad(), boundaries(decoder) as states:
        final = decoder.run(tiny_ids())
        outputs = model(tiny_ids(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(decoder.base.norm(states[4]), final)
    assert not torch.allclose(states[4], outputs[-1], atol=0.1)
    assert torch.equal(states[3], outputs[3]) and torch.equal(states[0], outputs[0])


def test_small_angles_keep_their_digits():
    """Late in a deep model neighbours differ by 1e-7 and less in cosine, which is what fp32 rounds away."""
    torch.manual_seed(0)
    first = torch.randn(1, 400, 64)
    states = {0: first, 1: first + 1e-3 * torch.randn_like(first), 2: -first}
    exact = {b: s.double() for b, s in states.items()}
    cosine = F.cosine_similarity(exact[0], exact[1], dim=-1)
    statistics = LayerStatistics(2, 1)
    statistics.update(states, torch.ones(1, 400, dtype=torch.bool))
    found = statistics.compute()
    assert float((1 - cosine).mean()) < 1e-6
    torch.testing.assert_close(found["block_influence"][0], (1 - cosine).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found["span_all"][0], (cosine.arccos() / math.pi).mean(), rtol=1e-4, atol=0)
    assert float(found["block_influence"][1]) == 1 and float(found["span_all"][1]) == pytest.approx(1, abs=1e-3)


def test_hooks_are_removed_again():
    decoder = Decoder(tiny_model())
    with pytest.raises(RuntimeError), boundaries(decoder), projection_inputs(decoder, 0, lambda *a: None):
        raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.model.modules())


def test_batching_changes_nothing():
    """A different batch size changes a result by rounding of the matrix products alone."""
    decoder = Decoder(tiny_model())
    ids, mask = padded()
    one = collect(decoder, ids, mask, batch=1)
    for batch in (2, 3, 5):
        other = collect(decoder, ids, mask, batch)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)


def test_batching_of_sums_is_exact():
    """Given the very same states, the split over batches does not show in eight digits."""
    torch.manual_seed(0)
    states = {b: torch.randn(6, 50, 8) + 20 for b in range(4)}
    mask = torch.rand(6, 50) > 0.3
    x = torch.randn(6, 50, 5)
    results = []
    for batch in (1, 2, 3, 6):
        statistics = LayerStatistics(3, 2, (5, 5))
        for i in range(0, 6, batch):
            part = slice(i, i + batch)
            statistics.add_channels("mlp", 1, x[part], mask[part])
            statistics.update({b: s[part] for b, s in states.items()}, mask[part])
        results.append({n: [f"{v:.8g}" for v in t.flatten().tolist()] for n, t in statistics.compute().items()})
    assert results[0] == results[1] == results[2] == results[3]
    assert float(results[0]["block_influence"][0]) > 0


def test_windows_of_weight_zero_count_nothing():
    decoder = Decoder(tiny_model("opt"))
    ids, mask = padded()
    expected = collect(decoder, ids, mask)
    filled = torch.cat([ids, ids[:1]]), torch.cat([mask, torch.zeros_like(mask[:1])])
    for name, value in collect(decoder, *filled, batch=3).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


# -- suffix passes -----------------------------------------------------------------------------------------------------


def module_with(model: Any, cache: Any, span: int = 2, monitor: int = 4) -> PruningModule:
    module = PruningModule(cache=cache, monitor=monitor)
    module.attach(model, Record(len(Decoder(model))), needs=CoMe.needs, span=span)
    module.on_train_start()
    return module


def one_pass(module: PruningModule, ids: Tensor, mask: Tensor, batch: int = 2) -> dict[str, Tensor]:
    for index, i in enumerate(range(0, len(ids), batch)):
        module.training_step({"input_ids": ids[i : i + batch], "mask": mask[i : i + batch]}, index)
    return module.statistics.compute()


def merge_step(module: PruningModule, first: int, ratio: list[float], count: int = 2) -> Step:
    decoder = module.student
    heads, kept = decoder.geometry.kv_heads, []
    for i in range(count):
        mine = tuple(range(i, heads, count))
        kept.append(taps_kept(mine, tuple(range(i, 48, count))))
    return Step("merge", list(range(first, first + count)), ratio, kept, "mean")


def taps_kept(heads: tuple[int, ...], neurons: tuple[int, ...]) -> Any:
    from come_pl.surgery import Kept

    return Kept(heads, neurons)


STEPS: dict[str, list[tuple[str, int]]] = {
    "upwards": [("merge", 1), ("merge", 2), ("drop", 3)],
    "downwards": [("merge", 4), ("drop", 2), ("merge", 0)],
    "from the top": [("drop", 5), ("drop", 4), ("merge", 1), ("drop", 0)],
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "opt", "gemma3"])
def test_suffix_passes_are_full_passes_bit_for_bit(family: str, steps: str):
    """Invariant 7: with the streams kept, only the layers from the lowest changed one run; nothing of the result
    changes."""
    ids, mask = padded()
    modules = [module_with(tiny_model(family, layers=6), cache, span=3) for cache in ("ram", "none")]
    ran: list[int] = []
    for kind, first in [*STEPS[steps], ("end", 0)]:
        results = [one_pass(module, ids, mask) for module in modules]
        assert results[0].keys() == results[1].keys()
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), (kind, first, name)
        fresh = collect(modules[0].student, ids, mask, span=3)
        for name, value in fresh.items():
            assert torch.equal(value, results[0][name]), (kind, first, name)
        assert modules[0].loss(0, skip=[1]) == modules[1].loss(0, skip=[1]) == modules[0].loss(1, skip=[1])
        if kind == "end":
            break
        for module in modules:
            step = Step("drop", [first]) if kind == "drop" else merge_step(module, first, [0.7, 0.3])
            module.do(step)
            module.record.append(step)
        ran.append(modules[0].start)
        assert modules[0].monitor() == modules[1].monitor()
    assert ran == [first for _, first in STEPS[steps]] and modules[1].start == 0


def test_suffix_pass_does_not_run_what_is_below():
    module = module_with(tiny_model(layers=5), "ram")
    ids, mask = padded((12, 12))
    one_pass(module, ids, mask)
    module.do(merge_step(module, 2, [0.5, 0.5]))
    calls: list[int] = []
    for index, layer in enumerate(module.student.layers):
        layer.register_forward_hook(lambda *a, index=index: calls.append(index))
    one_pass(module, ids, mask)
    assert calls == [2, 3]


def test_monitor_takes_exactly_the_first_windows():
    ids, mask = padded((12, 9, 12, 7, 5))
    module = module_with(tiny_model(), "ram", monitor=3)
    one_pass(module, ids, mask)  # batches of 2, 2, 1: half of the second is monitored
    assert {index: len(final) for index, final in module._teacher_final.items()} == {0: 2, 1: 1}
    module.do(Step("drop", [2]))
    loss, kl = module.monitor()
    nats = predicted = divergence = tokens = 0.0
    with torch.no_grad():
        for row, real in zip(ids[:3], mask[:3]):
            row = row[real]
            student = module.student_model(row[None]).logits[0].log_softmax(-1)
            teacher = module.teacher_model(row[None]).logits[0].log_softmax(-1)
            nats += float(F.nll_loss(student[:-1], row[1:], reduction="sum"))
            divergence += float(F.kl_div(student, teacher, reduction="sum", log_target=True))
            predicted, tokens = predicted + len(row) - 1, tokens + len(row)
    assert loss == pytest.approx(nats / predicted, rel=1e-5)
    assert kl == pytest.approx(divergence / tokens, rel=1e-5) and kl > 1e-3


def test_bound_gives_up_only_what_is_worse():
    ids, mask = padded()
    module = module_with(tiny_model(), "ram")
    one_pass(module, ids, mask, batch=1)
    loss = module.loss(1, skip=[1, 2])
    runs: list[int] = []
    module.student.layers[3].register_forward_hook(lambda *a: runs.append(1))
    assert module.loss(1, skip=[1, 2], bound=loss * 1.001) == loss and len(runs) == 5
    runs.clear()
    assert module.loss(1, skip=[1, 2], bound=loss * 0.2) == math.inf and len(runs) < 5
    assert module.loss(0, skip=[1, 2], bound=loss) == loss, "an equal loss is not above the bound"


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_losses_are_those_of_transformers(family: str):
    model = tiny_model(family)
    decoder = Decoder(model)
    ids, mask = padded()
    with torch.no_grad():
        assert torch.equal(decoder.logits(decoder.run(ids)), model(ids).logits)
        labels = ids.where(mask, -100)
        expected = model(ids, attention_mask=mask.long(), labels=labels).loss
        losses = taps.token_losses(decoder, decoder.run(ids, mask.long()), ids, mask)
    assert losses.shape == (5, 11)
    predicted = sum(n - 1 for n in LENGTHS)
    torch.testing.assert_close(losses.sum() / predicted, expected, rtol=1e-5, atol=1e-6)
    assert (losses[~taps.targets_of(mask)] == 0).all() and (losses[taps.targets_of(mask)] > 0).all()


def test_soft_cap_matters_in_the_test_above():
    model = tiny_model("gemma2")
    decoder = Decoder(model)
    with torch.no_grad():
        hidden = decoder.run(tiny_ids())
        assert (decoder.logits(hidden) - model.lm_head(hidden)).abs().max() > 0.01


def test_what_padding_predicts_never_enters():
    decoder = Decoder(tiny_model())
    ids, mask = padded()
    with torch.no_grad():
        hidden = decoder.run(ids, mask.long())
        expected = taps.token_losses(decoder, hidden, ids, mask)
        hidden = hidden.masked_fill(~mask[..., None], math.nan)
        assert torch.equal(taps.token_losses(decoder, hidden, ids, mask), expected)


@pytest.mark.parametrize("positions", [1, 3, 5])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, positions: int):
    model = tiny_model()
    ids, mask = padded()
    whole = perplexity(model, ids, mask, progress=False)
    decoder, other = Decoder(model), Decoder(tiny_model(seed=7))
    with torch.no_grad():
        hidden, there = decoder.run(ids), other.run(ids)
        both = taps.losses_and_divergences(decoder, hidden, other, there, ids, mask)
        torch.testing.assert_close(both[0], taps.token_losses(decoder, hidden, ids, mask))
        monkeypatch.setattr(taps, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * 4 * positions)
        sizes: list[int] = []
        model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[0] // 4))
        chunked = perplexity(model, ids, mask, progress=False)
        assert sizes[0] == positions
        torch.testing.assert_close(taps.losses_and_divergences(decoder, hidden, other, there, ids, mask), both)
    assert chunked.nats == pytest.approx(whole.nats, rel=1e-6) and chunked.tokens == whole.tokens


def test_half_precision_has_chunks_of_its_own(monkeypatch: pytest.MonkeyPatch):
    decoder = Decoder(tiny_model().to(torch.bfloat16))
    ids, mask = padded()
    with torch.no_grad():
        hidden = decoder.run(ids)
        whole = taps.token_losses(decoder, hidden, ids, mask)
        monkeypatch.setattr(taps, "HALF_CHUNK_BYTES", 2 * VOCABULARY * len(ids) * 2)
        monkeypatch.setattr(taps, "CACHED_BYTES", 4 * VOCABULARY * 3)  # slices of three rows
        sizes: list[int] = []
        decoder.model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[0] // len(ids)))
        slices: list[int] = []

        def cross_entropy(logits: torch.Tensor, *args: torch.Tensor, of: Any = F.cross_entropy, **how: Any) -> Any:
            slices.append(len(logits))
            return of(logits, *args, **how)

        monkeypatch.setattr(taps.F, "cross_entropy", cross_entropy)
        torch.testing.assert_close(taps.token_losses(decoder, hidden, ids, mask), whole, rtol=1e-2, atol=1e-3)
    assert set(sizes[:-1]) == {2} and sizes[-1] <= 2
    assert max(slices) == 3


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_perplexity_by_hand(batch: int):
    model = tiny_model("opt")
    ids, mask = padded()
    nats, count = 0.0, 0
    with torch.no_grad():
        for row, real in zip(ids, mask):
            row = row[real]
            for t in range(len(row) - 1):
                probabilities = model(row[None, : t + 1]).logits[0, -1].double().softmax(-1)
                nats -= math.log(float(probabilities[row[t + 1]]))
                count += 1
    found = perplexity(model, ids, mask, batch_size=batch, progress=False)
    assert found.tokens == count
    assert found.nats == pytest.approx(nats / count, rel=1e-5)
    assert found.token == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_divergences_by_torch():
    student, teacher = Decoder(tiny_model("gemma2")), Decoder(tiny_model("gemma2", seed=1))
    ids = tiny_ids()
    with torch.no_grad():
        mask = torch.ones_like(ids, dtype=torch.bool)
        _, found = taps.losses_and_divergences(student, student.run(ids), teacher, teacher.run(ids), ids, mask)
        log_student, log_teacher = (d.model(ids).logits.log_softmax(-1) for d in (student, teacher))
        expected = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.mean() > 1e-3
