"""Races of merge sites: what they leave out, and that what is kept is what a whole pass gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_loop import Windows, prune

from benchmarks.cost import counted
from come_pl.pruning.loop import ProgressivePruning
from come_pl.pruning.methods.come import CoMe, keep, merge_ratio
from come_pl.pruning.methods.come_p import CoMeP
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.pruning.sites import SiteRace, Sites
from come_pl.record import Record
from come_pl.taps import stream_at

LAYERS = 8


def errors(monkeypatch: pytest.MonkeyPatch, z: float) -> None:
    """Standard errors that a site is given up at: four, with as few tokens as here, are more than any race sees."""
    monkeypatch.setattr("come_pl.pruning.sites.ERRORS", z)


def run(folder: Path, race: bool, repeat: bool = False, **options: Any) -> tuple[PruningModule, int]:
    """A run of three steps, and how many tokens its layers were run on."""
    model = tiny_model(layers=LAYERS, seed=3)
    record = Record(LAYERS, folder / "record.jsonl")
    folder.mkdir()
    with counted(model, 1) as cost:
        method = CoMe(race=race, wo_repeat=False if repeat else None)
        module = prune(folder, method=method, target=5, model=model, record=record, **options)
    return module, cost.layer_tokens


def lines(module: PruningModule) -> list[dict[str, Any]]:
    found = [json.loads(step.to_json()) for step in module.record.steps]
    return [{k: v for k, v in step.items() if k not in ("seconds", "peak_gib")} for step in found]


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_a_race_that_gives_nothing_up_is_no_race(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where every site may be merged again: a pass ends with the highest that may be."""
    errors(monkeypatch, math.inf)
    plain, cost = run(tmp_path / "plain", False, repeat=True, cache=cache)
    raced, raced_cost = run(tmp_path / "raced", True, repeat=True, cache=cache)
    assert lines(plain) == lines(raced) and cost == raced_cost


@pytest.mark.parametrize("monitor", [1, 4])
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_what_is_chosen_is_measured_on_all_tokens(
    cache: Any, monitor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ratio, channels and monitoring of each step against a module of its own that runs everything."""
    errors(monkeypatch, 0.5)
    _, cost = run(tmp_path / "plain", False, cache=cache, monitor=monitor)
    raced, raced_cost = run(tmp_path / "raced", True, cache=cache, monitor=monitor)
    assert raced_cost < cost
    model, left_out = tiny_model(layers=LAYERS, seed=3), 0
    for number, step in enumerate(raced.record.steps):
        before = Record(LAYERS)
        for earlier in raced.record.steps[:number]:
            before.append(earlier)
        fresh = PruningModule(monitor=monitor)
        fresh.attach(model, before, needs=CoMe().needs)
        for index, batch in enumerate(Windows().train_dataloader()):
            fresh.training_step(batch, index)
        statistics = fresh.statistics.compute()
        influence = [float(statistics["block_influence"][layer]) for layer in step.layers]
        ratio = merge_ratio(influence, sum(len(before.groups[layer]) for layer in step.layers), 1.0, 0.9)
        assert step.ratio == pytest.approx(ratio, rel=1e-6)
        assert step.kept == keep(fresh.student, step.layers, step.ratio, statistics)
        scores = step.scores["span_distance"]
        assert scores[step.layers[0]] == min(scores)
        assert scores[step.layers[0]] == pytest.approx(float(statistics["span_all"][step.layers[0]]), rel=1e-9)
        left_out += sum(
            score < math.inf and score != pytest.approx(float(whole), rel=1e-9)
            for score, whole in zip(scores, statistics["span_all"], strict=True)
        )
        fresh.do(step)
        assert (step.loss, step.kl) == pytest.approx(fresh.monitor(), rel=1e-5)
    assert left_out, "no site was given up: nothing is tested here"


def test_a_run_that_was_cut_off_ends_with_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    errors(monkeypatch, 0.5)
    whole, _ = run(tmp_path / "whole", True)
    for done in (1, 2):
        cut, _ = run(tmp_path / f"cut{done}", True, trainer={"max_steps": done})
        assert len(cut.record.steps) == done
        read = Record.read(tmp_path / f"cut{done}" / "record.jsonl", LAYERS)
        model = tiny_model(layers=LAYERS, seed=3)
        resumed = prune(tmp_path / f"cut{done}", method=CoMe(race=True), target=5, model=model, record=read)
        assert lines(resumed) == lines(whole)
        weights = resumed.student_model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in whole.student_model.state_dict().items())


def test_repair_follows_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sweeps start from streams that are valid to other heights in other batches."""
    errors(monkeypatch, 0.5)
    refit, found = Refit("down", when="end", folds=2), []
    for cache in ("ram", "none"):
        found.append(run(tmp_path / cache, True, cache=cache, refit=refit)[0])
    assert lines(found[0])[-1]["scores"]["refit_error"] == pytest.approx(lines(found[1])[-1]["scores"]["refit_error"])
    other = found[1].student_model.state_dict()
    for name, value in found[0].student_model.state_dict().items():
        torch.testing.assert_close(value, other[name])


def test_streams_that_a_race_left_out_are_run_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    errors(monkeypatch, 0.0)
    module = PruningModule()
    module.attach(tiny_model(layers=LAYERS, seed=3), Record(LAYERS), needs=CoMe().needs)
    module.sites.begin(CoMe(race=True).sites(module.record, 3))
    for index, batch in enumerate(Windows().train_dataloader()):
        module.training_step(batch, index)
    assert module.sites.stop is not None and module.sites.stop < LAYERS
    for index, batch in enumerate(module.batches):
        for boundary in range(LAYERS + 1):
            expected = stream_at(module.student, boundary, batch["input_ids"], batch["attention"])
            torch.testing.assert_close(module.stream(index, boundary), expected)


def test_sites_are_given_up_and_keep_their_distance():
    """Two batches, sites that end at boundaries 2 … 5, one of them far worse, one never allowed."""
    race, generator = SiteRace(), torch.Generator().manual_seed(0)
    base = torch.rand(2, 3, 20, generator=generator)
    offsets = {2: 0.3, 3: 0.2, 5: 3.0}
    distances = {end: base + more + torch.rand(base.shape, generator=generator) for end, more in offsets.items()}
    masks = [torch.rand(3, 20, generator=generator) > 0.2 for _ in range(2)]
    race.begin(Sites([2, 3, 5], 2))
    assert race.stop == 5
    for end, values in distances.items():
        race.seen(0, end, 2, values[0].double())
    race.narrow(masks[:1])
    assert race.stop == 3, "the second batch need not run further"
    for end in (2, 3):
        race.seen(1, end, 2, distances[end][1])
    race.narrow(masks)
    mean = {e: float(v[torch.stack(masks)].mean()) for e, v in distances.items()}
    statistics = {"span_all_2": torch.tensor([mean[2], mean[3], 7.0, 0.001])}  # of sites that end at 2, 3, 4, 5
    race.settle(statistics, span=3)
    # the leader of the first batch, then the last one
    first = min(offsets, key=lambda end: float(distances[end][0][masks[0]].mean()))
    last = min((2, 3), key=lambda end: mean[end])
    above = float((distances[5][0] - distances[first][0])[masks[0]].mean()) + mean[first] - mean[last]
    assert statistics["span_all_2"].tolist() == pytest.approx([mean[2], mean[3], 7.0, mean[last] + above], rel=1e-5)
    race.forget(3)
    assert set(race._distances) == {(0, 2, 2), (0, 3, 2), (1, 2, 2), (1, 3, 2)}
    race.begin(None)
    assert race.stop is None


def test_what_cannot_be_raced(tmp_path: Path):
    for options in ({"span_tokens": "last"}, {"skip_method": "mka"}, {"select": "local"}):
        with pytest.raises(ValueError, match="race: sites are raced by"):
            CoMe(race=True, **options)  # type: ignore[arg-type]
    record = Record(LAYERS)
    for method in (CoMe(), CoMeP(race=True, span_tokens="last"), CoMeP(race=True, skip_method="sleb")):
        assert method.sites(record, 3) is None
    assert CoMeP(race=True).sites(record, 3) == Sites(list(range(2, 9)), 2)
    assert CoMe(race=True, merge_item=3).sites(record, 1) == Sites(list(range(2, 9)), 2)
    module, _ = run(tmp_path / "run", True)
    module.record = Record(LAYERS)
    for target, refit, world in ((5, "none", 2), (8, "none", 1), (5, "down", 1)):
        callback = ProgressivePruning(CoMe(race=True), target, refit=Refit(refit, when="step"))  # type: ignore[arg-type]
        module._trainer = type("Two", (), {"world_size": world})()
        callback.announce(module)
        assert module.sites.stop is None, "processes, a run at its end, repair after each step: all of it runs"
