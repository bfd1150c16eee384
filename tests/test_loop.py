"""Whole runs through Lightning's Trainer, in this process, on tiny models and made-up windows."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_ids, tiny_model
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.cost import counted
from come_pl.decoder import Decoder
from come_pl.pruning.loop import ProgressivePruning, PruningBar
from come_pl.pruning.methods.come import CoMe
from come_pl.pruning.methods.come_p import CoMeP
from come_pl.pruning.methods.shortest_path import ShortestPath
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Record, replay

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
LAYERS = 6


class Windows(LightningDataModule):
    """Random windows, every third padded on the right."""

    def __init__(self, batch: int = 2, count: int = 6, seq: int = 12):
        super().__init__()
        ids = tiny_ids(count, seq)
        lengths = torch.tensor([seq if i % 3 else seq - 5 for i in range(count)])
        mask = torch.arange(seq) < lengths[:, None]
        self.items = [{"input_ids": i, "mask": m} for i, m in zip(ids, mask)]
        self.batch = batch

    def train_dataloader(self) -> Any:
        return DataLoader(self.items, batch_size=self.batch)  # type: ignore[arg-type]


def prune(
    tmp_path: Path,
    *,
    method: CoMe | None = None,
    target: int = 3,
    model: Any = None,
    record: Record | None = None,
    batch: int = 2,
    trainer: dict[str, Any] | None = None,
    after_step: Any = None,
    refit: Refit | None = None,
    products: torch.dtype | None = None,
    **options: Any,
) -> PruningModule:
    method = method or CoMe()
    model = tiny_model(layers=LAYERS) if model is None else model
    module = PruningModule(**options)
    module.products = products
    tmp_path.mkdir(exist_ok=True)
    record = record or Record(LAYERS, tmp_path / "record.jsonl")
    module.attach(model, record, needs=method.needs, span=method.span)
    settings: dict[str, Any] = {"max_epochs": -1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    settings |= {"enable_model_summary": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = ProgressivePruning(method, target, after_step, refit)
        Trainer(callbacks=[callback], **(settings | (trainer or {}))).fit(module, Windows(batch))
    return module


def lines(module: PruningModule) -> list[str]:
    """The record without what a clock and the kernel say."""
    for step in module.record.steps:
        step.seconds = step.peak_gib = 0.0
    return [step.to_json() for step in module.record.steps]


@pytest.mark.parametrize("method", [CoMe(), CoMeP(granularity=4), CoMe(skip_method="sleb", norm="fold")])
def test_a_run_reaches_its_target_and_can_be_replayed(tmp_path: Path, method: CoMe):
    dense = tiny_model(layers=LAYERS)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    depths: list[int] = []
    module = prune(
        tmp_path,
        method=method,
        model=dense,
        after_step=lambda m: depths.append(len(Record.read(tmp_path / "record.jsonl", LAYERS).groups)),
    )
    assert depths == [5, 4, 3], "the record on disk has each step before anything else is done with it"
    assert len(module.student) == module.record.layers == module.student.config.num_hidden_layers == 3
    assert sum(module.record.groups, []) == list(range(LAYERS))
    for step in module.record.steps:
        assert step.loss is not None and step.kl is not None and step.seconds > 0 and step.peak_gib > 0
        assert step.kl > 0 and math.isfinite(step.loss)
    losses = [step.kl for step in module.record.steps]
    assert len(set(losses)) == 3, "the student that is monitored changes"
    again = replay(Record.read(tmp_path / "record.jsonl", LAYERS), dense)
    expected = module.student_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_on_the_way_to_a_repair_at_the_end_nothing_is_measured_for_its_own_sake(tmp_path: Path) -> None:
    def measured(name: str, method: Any, refit: Refit | None, **options: Any) -> list[bool]:
        module = prune(tmp_path / name, method=method, refit=refit, **options)
        return [step.loss is not None for step in module.record.steps]

    end = Refit("down", "end")
    assert measured("planned", ShortestPath(windows=1, bridge=1), end) == [False, False, True]
    assert measured("stopped", ShortestPath(windows=1, bridge=1), end, trainer={"max_steps": 2}) == [False, True]
    assert measured("not repaired", ShortestPath(windows=1, bridge=0), None) == [True, True, True]
    assert measured("a pass follows", CoMe(), end) == [True, True, True]


def test_dense_layers_that_nobody_needs_leave_memory_and_come_back(tmp_path: Path) -> None:
    dense, held = tiny_model(layers=LAYERS), []

    def look(module: PruningModule) -> None:
        ours = {id(p) for p in module.student_model.parameters()}
        matrices = [p for p in module.teacher.layers.parameters() if p.dim() == 2]
        held.append([p.untyped_storage().nbytes() == p.nbytes for p in matrices])
        assert held[-1] == [id(p) in ours for p in matrices]

    before = {name: value.clone() for name, value in dense.state_dict().items()}
    prune(tmp_path, model=dense, after_step=look)
    assert not all(held[0]) and sum(held[2]) < sum(held[0])
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("method", [CoMe(merge_item=3), CoMeP(granularity=4), CoMe(skip_method="sleb")])
def test_the_cache_changes_nothing(tmp_path: Path, method: CoMe):
    """Invariant 7, as far as the written record."""
    records = [lines(prune(tmp_path / c, method=method, target=2, cache=c)) for c in ("ram", "none")]  # type: ignore[arg-type]
    assert records[0] == records[1] and len(records[0]) >= 2


@pytest.mark.parametrize("method", [CoMe(), CoMeP(granularity=4, search="coarse")])
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_monitoring_is_part_of_the_next_pass(tmp_path: Path, method: CoMe, cache: Any):
    """What is run to monitor a step is measured while it runs: the next pass goes on with the other batches, and the
    record is the same, bit for bit."""
    found = []
    for monitor in (1, 3, 100):  # windows: one batch, two batches, all three
        dense = tiny_model(layers=LAYERS)
        with counted(dense, 1) as cost:
            module = prune(tmp_path / str(monitor), method=method, model=dense, cache=cache, monitor=monitor)
        for step in module.record.steps:
            step.loss = step.kl = None
        found.append((lines(module), [step.layers[0] for step in module.record.steps], cost.layer_runs))
    assert found[0][0] == found[1][0] == found[2][0]
    for more, (_, sites, runs) in zip((1, 2), found[1:]):
        # for each batch that is monitored: the student after the last step; the teacher ran as the first student
        last = LAYERS - 3 - (sites[-1] if cache == "ram" else 0)
        assert runs - found[0][2] == more * last
    if type(method) is CoMe and cache == "ram":
        suffixes = [LAYERS - 1 - number - site for number, site in enumerate(found[0][1])]
        assert found[0][2] == 3 * LAYERS + 3 * sum(suffixes[:-1]) + suffixes[-1]


@pytest.mark.parametrize("monitor", [1, 3, 6])
def test_batch_size_changes_neither_decisions_nor_what_is_monitored(tmp_path: Path, monitor: int):
    found = [prune(tmp_path, batch=batch, monitor=monitor).record.steps for batch in (1, 2, 6)]
    for steps in found[1:]:
        assert [(s.layers, s.kept) for s in steps] == [(s.layers, s.kept) for s in found[0]]
        for name in ("loss", "kl"):
            assert [getattr(s, name) for s in steps] == pytest.approx([getattr(s, name) for s in found[0]], rel=1e-4)


def test_max_steps_stops_early_and_the_record_goes_on(tmp_path: Path):
    """A run in two halves writes what a run in one does."""
    whole = prune(tmp_path / "whole")
    first = prune(tmp_path / "half", trainer={"max_steps": 1})
    assert first.record.layers == 5 and len(first.record.steps) == 1
    record = Record.read(tmp_path / "half" / "record.jsonl", LAYERS)
    second = prune(tmp_path / "half", record=record)
    assert second.record.layers == 3
    assert lines(second) == lines(whole)
    states = [m.student_model.state_dict() for m in (whole, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("method", [CoMe(), CoMe(race=True), CoMe(span_tokens="last"), CoMeP(granularity=2)])
def test_down_to_one_layer(tmp_path: Path, method: CoMe):
    """The last step has one site, and one score."""
    module = prune(tmp_path, method=method, target=1)
    assert module.record.layers == len(module.student) == 1
    assert len(module.record.steps[-1].scores["span_distance"]) == 1


def test_a_last_step_that_removes_fewer(tmp_path: Path):
    module = prune(tmp_path, method=CoMe(merge_item=3), target=3)
    assert [len(s.layers) for s in module.record.steps] == [3, 2]
    assert len(module.record.steps[1].scores["span_distance"]) == 3


@pytest.mark.parametrize("norm", ["mean", "fold"])
def test_bfloat16(tmp_path: Path, norm: Any):
    model = tiny_model(layers=LAYERS).to(torch.bfloat16)
    module = prune(tmp_path, model=model, method=CoMe(norm=norm))
    assert module.record.layers == 3
    assert {p.dtype for p in module.student_model.parameters()} == {torch.bfloat16}
    assert all(step.loss is not None and math.isfinite(step.loss) for step in module.record.steps)
    replayed = replay(Record.read(tmp_path / "record.jsonl", LAYERS), tiny_model(layers=LAYERS).to(torch.bfloat16))
    expected = module.student_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in replayed.state_dict().items())


@pytest.mark.parametrize("where", ["weights", "stream"])
def test_overflow_is_one_clear_error(tmp_path: Path, where: str):
    model = tiny_model(layers=LAYERS)
    with torch.no_grad():
        if where == "weights":
            model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
        else:
            model.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(NotFinite, match="not finite"):
        prune(tmp_path, model=model)
    assert not (tmp_path / "record.jsonl").exists()


def test_at_least_one_window_is_monitored():
    with pytest.raises(ValueError, match="monitor 0"):
        PruningModule(monitor=0)


def test_checkpoints_hold_no_weights(tmp_path: Path):
    module = prune(tmp_path, target=5)
    assert module.state_dict() == {}
    assert len(Decoder(module.teacher_model)) == LAYERS


def test_the_bar_says_what_an_epoch_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module = PruningModule()
    module.attach(tiny_model(layers=LAYERS), Record(LAYERS), needs=CoMe.needs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            callbacks=[PruningBar(), ProgressivePruning(CoMe(), 4)],
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=tmp_path,
        )
        trainer.fit(module, Windows())
    out = "".join(capsys.readouterr())
    assert "measuring 6 layers" in out
    lowest = module.record.steps[0].layers[0]
    assert "measuring 5 layers" + (f", from layer {lowest}" if lowest else "") in out
