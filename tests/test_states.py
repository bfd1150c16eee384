"""Streams and inputs that are kept while layers are repaired: nothing runs twice, and what comes out is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import SOLVABLE, tiny_ids, tiny_model
from test_refit import merge, ready
from torch import Tensor, nn

from come_pl.pruning.inputs import KnownInputs
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Record, Step, lowest_changed
from come_pl.surgery import set_weights
from come_pl.taps import layer_run, stream_at


@contextmanager
def calls(*modules: nn.Module) -> Iterator[list[int]]:
    """How often each runs."""
    counts = [0] * len(modules)

    def count(place: int) -> Any:
        def hook(*_: Any) -> None:
            counts[place] += 1

        return hook

    handles = [module.register_forward_hook(count(place)) for place, module in enumerate(modules)]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", SOLVABLE)
def test_a_layer_runs_again_only_where_something_has_changed(family: str) -> None:
    module, _, _ = ready(family, Step("drop", [2]))
    student, names, known = module.student, module.student.family, KnownInputs()
    query, first = (student.part(student.layers[1], path) for path in (names.query, names.mlp_inputs[0]))
    batch, hidden = module.batches[0], module.stream(0, 1)
    inputs = batch["input_ids"], batch["attention"], hidden
    own_block = "." in names.mlp_output

    def run(path: str) -> tuple[tuple[Tensor, Tensor], list[int]]:
        with torch.inference_mode(), known.used(student, 1, 0), calls(query, first) as counts:
            return layer_run(student, 1, path, *inputs), counts

    def plain(path: str) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return layer_run(student, 1, path, *inputs)

    def change(*paths: str) -> None:
        for path in paths:
            set_weights(student, {f"1.{path}.weight": 1.1 * student.part(student.layers[1], path).weight})
        known.changed(student, paths)

    known.begin(1)
    for changed, expected in (
        ((), [1, 1]),
        ((), [0, 0]),
        ((names.attention_output,), [0, 1]),
        ((names.mlp_output,), [0, 0]),
        ((*names.mlp_inputs, names.mlp_output), [0, 1]),
        ((names.value,), [1, 1]),
    ):
        if changed:
            change(*changed)
        found, counts = run(names.mlp_output)
        assert counts == [expected[0], expected[1] if own_block else 1], changed
        for got, wanted in zip(found, plain(names.mlp_output), strict=True):
            assert torch.equal(got, wanted), changed
    # what the MLP reads is there, even where it would not have to run
    module.inputs = known
    x = module.reads(0, 1, names.mlp_inputs[0])
    known.begin(None)
    assert torch.equal(x, module.reads(0, 1, names.mlp_inputs[0]))
    assert student.part(student.layers[1], names.query) is query, "all modules stand where they were"
    assert run(names.mlp_output)[1] == run(names.mlp_output)[1] == [1, 1], "nothing is kept of a layer not begun"


def steps_of(kind: str, heads: int) -> list[Step]:
    return {
        "drop": [Step("drop", [3]), Step("drop", [2])],
        "merge": [merge(2, heads)],
        "scaled": [Step("drop", [2], scale=1.5)],
    }[kind]


def repaired(family: str, kind: str, parts: Any, keep: bool, resumed: bool = False) -> dict[str, Tensor]:
    """Weights of a run of these steps, repaired at the end, with what is kept or without."""
    model, module, record = tiny_model(family, layers=6), PruningModule(monitor=1), Record(6)
    refit = Refit(parts, "end", sweep=2, last=1)
    ids = tiny_ids(windows=8, seq=12)

    def one_pass() -> None:
        for batch in range(2):
            part = ids[4 * batch : 4 * batch + 4]
            module.training_step({"input_ids": part, "mask": torch.ones_like(part, dtype=torch.bool)}, batch)

    module.attach(model, record, needs={"streams"})
    module.keeps_dense, module.inputs.enabled = keep, lambda: keep
    steps = steps_of(kind, module.student.geometry.kv_heads)
    for number, step in enumerate(steps):
        one_pass()
        module.do(step)
        record.append(step)
        refit.after(module, step, record, last=number + 1 == len(steps))
        if resumed and number == 0:
            module.attach(model, record, needs={"streams"})
            module.keeps_dense, module.inputs.enabled = keep, lambda: keep
    assert step.weights is not None
    return step.weights


@pytest.mark.parametrize(
    "family, kind, parts",
    [("llama", kind, parts) for kind in ("drop", "merge", "scaled") for parts in ("down", "both", "all")]
    + [("opt", "drop", "all"), ("qwen2-mixed", "merge", "all"), ("opt", "scaled", "both")],
)
def test_what_is_kept_changes_no_repair(family: str, kind: str, parts: str) -> None:
    plain = repaired(family, kind, parts, keep=False)
    for resumed in [False] + [True] * (kind == "drop"):
        found = repaired(family, kind, parts, keep=True, resumed=resumed)
        assert found.keys() == plain.keys() and len(found) > 2
        assert all(torch.equal(value, found[name]) for name, value in plain.items())


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("ran", [1, 2])
@pytest.mark.parametrize("kind", ["drop", "merge", "scaled"])
def test_streams_are_the_student_s(kind: str, ran: int, resumed: bool) -> None:
    """Of two batches, of which a pass may have run one only; after each step, and after weights have changed."""
    model, module, record = tiny_model("llama", layers=6), PruningModule(monitor=1), Record(6)
    ids = tiny_ids(windows=4, seq=12)
    module.attach(model, record, needs={"streams"})
    module.keeps_dense = True

    def all_right() -> None:
        module.reach(len(module.student))
        for batch in range(2):
            inputs = module.batches[batch]["input_ids"], None
            for boundary in range(len(module.student) + 1):
                expected = stream_at(module.student, boundary, *inputs)
                torch.testing.assert_close(module.stream(batch, boundary), expected, rtol=0, atol=0)
            for boundary in range(7):
                expected = stream_at(module.teacher, boundary, *inputs)
                torch.testing.assert_close(module.teacher_stream(batch, boundary), expected, rtol=0, atol=0)

    for step in steps_of(kind, module.student.geometry.kv_heads):
        module.pass_windows = 2 if ran == 1 else None
        for batch in range(2):
            part = ids[2 * batch : 2 * batch + 2]
            module.training_step({"input_ids": part, "mask": torch.ones_like(part, dtype=torch.bool)}, batch)
        with torch.no_grad():
            module.do(step)
            record.append(step)
            all_right()
            set_weights(module.student, {"1.mlp.down_proj.weight": 1.1 * module.student.layers[1].mlp.down_proj.weight})
            module.changed_from(1)
            all_right()
        if resumed:
            step.weights = {"1.mlp.down_proj.weight": module.student.layers[1].mlp.down_proj.weight.detach().clone()}
            module.attach(model, record, needs={"streams"})


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_the_dense_model_does_not_run_again_for_its_streams(cache: Any) -> None:
    model, module, record = tiny_model("llama", layers=5), PruningModule(monitor=1, cache=cache), Record(5)
    module.attach(model, record, needs={"streams"})
    module.keeps_dense = True
    ids = tiny_ids(windows=4, seq=12)
    module.training_step({"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, 0)
    before = [module.teacher_stream(0, boundary).clone() for boundary in range(6)]
    step = Step("drop", [2])
    with calls(module.teacher.layers[0]) as counts:
        module.do(step)
        record.append(step)
        for boundary in range(6):
            assert torch.equal(module.teacher_stream(0, boundary), before[boundary])
        for boundary in range(3):
            assert torch.equal(module.stream(0, boundary), before[boundary])
        assert counts[0] == 0 or cache == "none"
    assert not torch.equal(module.stream(0, 3), before[3])


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize("sweep", [1, 2])
@pytest.mark.parametrize("kind", ["drop", "merge", "scaled"])
def test_the_last_pass_keeps_little_and_loses_nothing(
    kind: str, sweep: int, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams below the layer that a repair has come to are not kept; repaired weights and streams are the same."""
    found = []
    for all_kept in (True, False):
        model, module, record = tiny_model("llama", layers=6), PruningModule(monitor=1, cache=cache), Record(6)
        ids = tiny_ids(windows=8, seq=12)
        module.attach(model, record, needs={"streams"})
        module.keeps_dense, module.pass_windows = True, 4
        if all_kept:
            monkeypatch.setattr(module, "keep_only", lambda *_: None)
        for batch in range(2):
            part = ids[4 * batch : 4 * batch + 4]
            module.training_step({"input_ids": part, "mask": torch.ones_like(part, dtype=torch.bool)}, batch)
        [*_, step] = steps_of(kind, module.student.geometry.kv_heads)
        module.do(step)
        record.append(step)
        begins: list[int] = []  # of the dense model, in the batch that no pass has run

        def advanced(layer: int, begins: list[int] = begins, module: PruningModule = module) -> None:
            if 1 in module._teacher_states:
                begins.append(min(module._teacher_states[1].held))
            type(module).advance(module, layer)

        monkeypatch.setattr(module, "advance", advanced)
        Refit("all", "end", last=2, sweep=sweep).after(module, step, record, last=True)
        with torch.inference_mode():
            found.append((step.weights, [module.monitor(), *(module._valid)]))
        depth = len(module.student)
        held = [sorted(block.held) for block in module._states if block]
        dense = [sorted(block.held) for block in module._teacher_states.values()]
        # nothing below the last layers, which have changed, and of the dense model its end
        assert len(held) == 2 and (min(map(len, held)) > 3 if all_kept else held == 2 * [[depth - 2, depth]])
        assert dense == 2 * [[*range(7)] if all_kept else [6]]
        lowest = next(group[0] for group in record.groups if len(group) > 1)
        assert begins[0] == (0 if all_kept or sweep > 1 else lowest)
        for batch in range(2):
            inputs = module.batches[batch]["input_ids"], None
            for boundary in range(depth + 1):
                assert torch.equal(module.stream(batch, boundary), stream_at(module.student, boundary, *inputs))
            for boundary in range(7):
                assert torch.equal(module.teacher_stream(batch, boundary), stream_at(module.teacher, boundary, *inputs))
    (kept, numbers), (alone, others) = found
    assert kept and kept.keys() == alone.keys() and all(torch.equal(value, alone[name]) for name, value in kept.items())
    assert numbers == others


def test_the_lowest_layer_that_a_step_changes() -> None:
    assert lowest_changed(Step("drop", [3])) == 3
    assert lowest_changed(Step("drop", [3], weights={"1.mlp.down_proj.weight": torch.zeros(1)})) == 1
    assert lowest_changed(Step("drop", [3], scale=1.5)) == -1
