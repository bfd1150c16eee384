"""Concatenation in a repair, against sums and layers written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SOLVABLE, tiny_ids, tiny_model

from come_pl.decoder import Decoder
from come_pl.pruning import channels
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Record, Step, replay
from come_pl.taps import projection_input


def ready(family: str = "llama", scale: float | None = None, cache: Any = "ram", **options: Any) -> tuple[Any, ...]:
    """A module whose layers 2 and 3 of five are gone, and streams that are valid up to the layer below."""
    model, module = tiny_model(family, layers=5), PruningModule(cache=cache, monitor=1)
    record = Record(5)
    refit = Refit(**({"parts": "all", "when": "end", "final": False, "folds": 2} | options))
    module.attach(model, record, needs=refit.needs)
    ids = tiny_ids(windows=16, seq=24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, :5] = False
    for batch in range(2):
        part = slice(8 * batch, 8 * batch + 8)
        module.training_step({"input_ids": ids[part], "mask": mask[part]}, batch)
    for number in range(2):
        step = Step("drop", [2], scale=scale if number else None)
        record.append(step)
        module.do(step)
    module.changed_from(-1)
    module.reach(1)
    assert record.groups[1] == [1, 2, 3]
    return module, record, refit, step


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_are_what_the_output_projection_gets(family: str) -> None:
    decoder = Decoder(tiny_model(family, layers=3))
    ids = tiny_ids(windows=2, seq=9)
    names, layer = decoder.family.mlp_inputs, decoder.layers[0]
    with torch.no_grad():
        hidden = decoder.base.embed_tokens(ids)
        x, found = (
            projection_input(decoder, 0, path, ids, None, hidden) for path in (names[0], decoder.family.mlp_output)
        )
        own = [(decoder.part(layer, path).weight, decoder.part(layer, path).bias) for path in names]
        torch.testing.assert_close(decoder.mlp_channels(x, own), found)


@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("family", SOLVABLE)
def test_the_most_important_channels_of_all_layers_of_a_group(family: str, scale: float | None) -> None:
    if family == "opt" and scale is not None:
        pytest.skip("one family with a bias is enough")
    module, record, refit, _ = ready(family, scale)
    student, teacher = module.student, module.teacher
    shape, width = student.family, student.geometry.ffn
    before = {k: v.clone() for k, v in module.teacher_model.state_dict().items()}
    x, weights, wanted = [], [], {layer: [] for layer in (1, 2, 3)}
    for number, batch in enumerate(module.batches):
        args = batch["input_ids"], batch["attention"]
        with torch.no_grad():
            seen = projection_input(student, 1, shape.mlp_inputs[0], *args, module.stream(number, 1))
            x.append(seen[batch["mask"]].double())
            dense = module.teacher_stream(number, 4)[batch["mask"]].double()
            weights.append(1 / dense.square().mean(-1))
            for layer, rows in wanted.items():
                stream = module.teacher_stream(number, layer)
                found = projection_input(teacher, layer, shape.mlp_inputs[0], *args, stream)
                rows.append(found[batch["mask"]].double())
    x, w = torch.cat(x), torch.cat(weights)
    rows, columns, biases, importance = [], [], [], []
    for layer in (1, 2, 3):
        fit = refit.input_equations(module, 1, layer, shape.mlp_inputs[0]).solve()
        lead = torch.eye(x.shape[1], dtype=torch.float64)
        if fit is not None:
            more = torch.cat(wanted[layer]) - x
            ridge = fit.strength * x.square().mean(0).mean() * len(x)
            lead += torch.linalg.solve(x.T @ x + ridge * lead, x.T @ more).T
        parts = [teacher.part(teacher.layers[layer], path) for path in shape.mlp_inputs]
        inputs = [part.weight.detach().double() @ lead for part in parts]
        values = [x @ weight.T for weight in inputs]
        if parts[0].bias is not None:
            values = [value + part.bias.detach().double() for value, part in zip(values, parts, strict=True)]
            biases.append([part.bias.detach() for part in parts])
        act = teacher.part(teacher.layers[layer], shape.activation)
        phi = act(values[0]) * (values[1] if len(values) > 1 else 1.0)
        # a drop scales the stream below it: here, the one of layer 3 what layers 1 and 2 write
        factor = scale if scale is not None and layer < 3 else 1.0
        down = factor * teacher.part(teacher.layers[layer], shape.mlp_output).weight.detach().double()
        importance.append((w[:, None] * phi.square()).sum(0).sqrt() * down.norm(dim=0))
        rows.append(inputs)
        columns.append(down)
    best = torch.cat(importance).topk(width).indices.sort().values
    assert 0 < int((best < width).sum()) < width, "all or none of them are its own: nothing is shown"

    found, shares = channels.concatenated(
        module,
        1,
        [1, 2, 3],
        lambda layer, reads: refit.input_equations(module, 1, layer, shape.mlp_inputs[0], reads).solve(),
        lambda number: torch.where(
            module.batches[number]["mask"], 1 / module.teacher_stream(number, 4).square().mean(-1), 0.0
        ),
    )
    assert shares == {layer: float((best // width == place).sum()) / width for place, layer in enumerate((1, 2, 3))}
    for number, path in enumerate(shape.mlp_inputs):
        expected = torch.cat([inputs[number] for inputs in rows])[best]
        torch.testing.assert_close(found[path]["weight"].double(), expected, rtol=1e-3, atol=1e-4)
        if biases:
            torch.testing.assert_close(found[path]["bias"], torch.cat([bias[number] for bias in biases])[best])
    expected = torch.cat(columns, 1)[:, best]
    torch.testing.assert_close(found[shape.mlp_output]["weight"].double(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in module.teacher_model.state_dict().items())


def repaired(sweep: int = 0, **options: Any) -> tuple[PruningModule, Record, Step]:
    module, record, refit, step = ready(sweep=sweep, **options)
    module.changed_from(0)
    refit.after(module, step, record, last=True)
    return module, record, step


@pytest.mark.parametrize("sweep", [1, 2])
def test_a_repaired_layer_has_channels_of_its_group_and_replays(sweep: int) -> None:
    module, record, step = repaired(sweep)
    kept = step.scores["channels_kept"]
    assert [kept[0], kept[4]] == [None, None] and 0 < kept[1] < 1 and sum(kept[1:4]) == pytest.approx(1)
    assert not any(parameter.is_inference() for parameter in module.student_model.parameters())
    again = replay(record, module.teacher_model)
    for name, value in module.student_model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("source", ["own", "group"])
def test_a_second_sweep_starts_from_what_the_dense_layers_read(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture is not led back as if it were one layer's, and nothing that is led back already is led again."""
    seen: list[tuple[int, str]] = []
    solved = Refit.input_equations

    def watched(self: Refit, module: PruningModule, index: int, layer: int, path: str, reads: Any = None) -> Any:
        if reads is None:
            read = module.student.family.mlp_inputs if "mlp" in path else ("self_attn.q_proj", "self_attn.v_proj")
            for name in read:
                own, dense = module.student.layers[index], module.teacher.layers[layer]
                weights = (
                    decoder.part(part, name).weight
                    for decoder, part in ((module.student, own), (module.teacher, dense))
                )
                assert torch.equal(*weights), (index, name)
            seen.append((index, path))
        return solved(self, module, index, layer, path, reads)

    monkeypatch.setattr(Refit, "input_equations", watched)
    _, _, step = repaired(2, channels=source)
    assert ("channels_kept" in step.scores) == (source == "group")
    assert len(seen) == 2 * len(set(seen)) and len(seen) >= 8


def test_it_lowers_the_error_that_it_is_chosen_by() -> None:
    group, own = repaired()[2], repaired(channels="own")[2]
    assert group.scores["refit_error"][1] < own.scores["refit_error"][1]
    assert "channels_kept" not in own.scores


def test_equal_errors_are_no_reason_to_keep_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("come_pl.pruning.refit._unseen", lambda fit, left: 1.0)
    assert "channels_kept" in repaired()[2].scores


def test_its_own_channels_stay_where_they_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = itertools.cycle([1.03, 1.0])  # of all, of its own
    monkeypatch.setattr("come_pl.pruning.refit._unseen", lambda fit, left: next(errors))
    module, record, step = repaired()
    monkeypatch.undo()
    own_module, _, own = repaired(channels="own")
    assert "channels_kept" not in step.scores and step.scores["refit_error"] == own.scores["refit_error"]
    for name, value in module.student_model.state_dict().items():
        torch.testing.assert_close(value, own_module.student_model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", ["down", "both"])
def test_only_a_repair_of_all_parts_concatenates(parts: Any) -> None:
    assert "channels_kept" not in repaired(parts=parts)[2].scores


def test_the_cache_changes_nothing() -> None:
    (ram, _, _), (none, _, _) = repaired(), repaired(cache="none")
    for name, value in ram.student_model.state_dict().items():
        torch.testing.assert_close(value, none.student_model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_bad_channels() -> None:
    with pytest.raises(ValueError, match="channels 'all'.*own or group"):
        Refit("all", channels="all")  # type: ignore[arg-type]
