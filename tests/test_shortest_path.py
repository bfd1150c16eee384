"""Dropping by a shortest path: paths by brute force, divergences from sums and logits of their own, plans of runs."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from lightning import Trainer
from test_drop_methods import IDS, MASK, dense_order, measured, streams
from test_loop import lines, prune
from tqdm.auto import tqdm

from come_pl.data import CalibrationData
from come_pl.decoder import Decoder
from come_pl.pruning import states
from come_pl.pruning.methods import shortest_path
from come_pl.pruning.methods.base import NoSite
from come_pl.pruning.methods.shortest_path import EVERY, BridgedModel, ShortestPath, shortest_paths
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Record
from come_pl.taps import layer_run, stream_at
from come_pl.workflows.prune import _selecting
from come_pl.workflows.prune import prune as run

FAMILIES = ("llama", "qwen2-mixed", "gemma2")
LAYERS = 6


def gaps_of(dropped: tuple[int, ...]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for layer in dropped:
        if found and found[-1][1] == layer:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return found


@pytest.mark.parametrize("depth, remove, most", [(7, 3, 3), (7, 4, 2), (6, 5, 5), (8, 1, 3), (5, 4, 1)])
def test_paths_are_the_best_of_all_sets(depth: int, remove: int, most: int):
    draw = random.Random(depth)
    for _ in range(5):
        cost = {(a, b): draw.random() * (b - a) for a in range(depth) for b in range(a + 1, depth + 1)}
        best: dict[int, float] = {}
        for dropped in itertools.combinations(range(1, depth), remove):
            gaps = gaps_of(dropped)
            if len(gaps) <= most:
                best[len(gaps)] = min(best.get(len(gaps), math.inf), sum(cost[gap] for gap in gaps))
        found = shortest_paths(depth, remove, most, cost.__getitem__)
        assert set(found) == set(best)
        for count, gaps in found.items():
            assert len(gaps) == count and sum(b - a for a, b in gaps) == remove
            assert sum(cost[gap] for gap in gaps) == pytest.approx(best[count], rel=1e-12)


def solved(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, strength: float) -> torch.Tensor:
    w = 1 / t.square().mean(-1, keepdim=True)
    a, b = (w * x).T @ x, (w * r).T @ x
    return b @ torch.linalg.inv(a + strength * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype))


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "opt"])
@pytest.mark.parametrize("gaps", [[(2, 4)], [(1, 2), (4, 6)], [(1, 3), (4, 5)]])
@pytest.mark.parametrize("large", [False, True])
def test_a_divergence_is_that_of_whole_runs(family: str, gaps: list[tuple[int, int]], large: bool):
    """One window measured, the other three solved on; each window alone, without padding. A token that is massive
    wherever it stands gets the dense stream after a gap."""
    dense = tiny_model(family, layers=LAYERS, seed=5)
    word = int(IDS[0, 3])
    if large:
        with torch.no_grad():
            dense.get_input_embeddings().weight[word] *= 60
    module = measured(dense, ShortestPath(windows=1, bridge=3))
    model = BridgedModel(module, 1, 3)
    found = model.divergence(gaps)
    assert model.divergence(gaps) == found

    decoder, whole = Decoder(dense), streams(dense)
    rows = [row[real][None] for row, real in zip(IDS, MASK)]
    big = [torch.stack([s.square().mean(-1) > 100 * s.square().mean(-1).median() for s in states]) for states in whole]
    assert any(bool(b.any()) for b in big) == large
    spared = [b.any(0) for b in big]
    here, start = [states[0] for states in whole], 0
    for first, end in gaps:
        x, out = [], []
        for window in range(4):
            stream, rest = here[window].float()[None], {"start": start}
            with torch.no_grad():
                stream = stream_at(decoder, first - 1, rows[window], hidden=stream, **rest) if first - 1 else stream
                after, feature = layer_run(decoder, first - 1, decoder.family.mlp_output, rows[window], None, stream)
            x.append(feature[0].double())
            out.append(after[0].double())
        t = torch.cat([states[end] for states in whole[1:]])
        before = torch.cat([states[first] for states in whole[1:]])
        change = solved(torch.cat(x[1:]), t - torch.cat(out[1:]), before, 0.3)
        for window in range(4):
            spared[window] = spared[window] & (big[window][first] == big[window][end])
            mapped = (out[window] + x[window] @ change.T).float().double()
            here[window] = torch.where(spared[window][:, None], whole[window][end], mapped)
        start = end
    nats, tokens = 0.0, 0
    for window in range(1):
        begin = int(MASK[window].long().argmax())
        at = [p - begin for p in range(0, MASK.shape[1], EVERY) if MASK[window, p]]
        with torch.no_grad():
            last = stream_at(decoder, LAYERS, rows[window], start=start, hidden=here[window].float()[None])
            ends = [decoder.final_norm(s.float()) for s in (whole[window][LAYERS][None], last)]
            p, q = (F.log_softmax(decoder.logits(e)[0, at].double(), -1) for e in ends)
        nats, tokens = nats + float((p.exp() * (p - q)).sum()), tokens + len(at)
    assert found == pytest.approx(nats / tokens, rel=2e-3, abs=1e-7) and found > 0


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 7, 12])
def test_processes_share_as_many_windows_as_one_has(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the text begins with, which are dealt out in turn; a process may have none of them."""
    module = PruningModule()
    module.hold()
    monkeypatch.setattr(PruningModule, "world", world)
    for windows in (1, 4, 20):
        found = []
        for rank in range(world):
            monkeypatch.setattr(PruningModule, "global_rank", rank)
            own = torch.arange(rank, 24, world)  # numbers of windows
            module.batches = [{"input_ids": part[:, None]} for part in own.split(2)]
            looks = module.monitored(windows)
            assert all(rows.stop > rows.start == 0 for rows in looks.values())
            found += [int(i) for look in looks.items() for i in module.part(look)["input_ids"]]
        assert sorted(found) == list(range(windows))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_gaps_have_in_common_changes_no_divergence(family: str) -> None:
    """Nor does the order in which they are measured, nor what is kept of streams."""
    sets = [[(2, 3)], [(2, 4)], [(1, 3)], [(2, 5)], [(2, 3), (4, 6)]]
    found = []
    for cache, order in (("ram", sets), ("ram", sets[::-1]), ("disk", sets), ("none", sets)):
        module = measured(tiny_model(family, layers=LAYERS, seed=5), ShortestPath(windows=1, bridge=3), cache=cache)
        model = BridgedModel(module, 1, 3)
        found.append({tuple(gaps): model.divergence(gaps) for gaps in order})
    assert all(other == found[0] for other in found[1:]) and len(set(found[0].values())) == len(sets)


def test_what_a_layer_gives_is_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes first; that of one layer is kept, whatever its size."""
    run, told = shortest_path.projection_input, []
    monkeypatch.setattr(shortest_path, "projection_input", lambda *a: told.append(a[1] + 1) or run(*a))
    gaps, found = [(2, 3), (3, 4), (2, 4), (4, 5), (3, 5), (2, 5)], []
    for room, expected in ((3.0, [2, 3, 4]), (2.0, [2, 3, 4, 2]), (0.0, [2, 3, 2, 4, 3, 2])):
        told.clear()
        module = measured(tiny_model("llama", layers=LAYERS, seed=5), ShortestPath(windows=1, bridge=3))
        one = 8 * 2 * module.student.geometry.ffn**2 + 4 * IDS.numel() * module.student.geometry.ffn
        monkeypatch.setattr(shortest_path, "KEPT", int(room * one))
        model = BridgedModel(module, 1, 3)
        found.append([model.divergence([gap]) for gap in gaps])
        assert told == [first for first in expected for _ in model.looks]
    assert found[0] == found[1] == found[2]


def test_a_pass_keeps_what_mlps_give_as_far_as_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same record as from nothing kept; nothing is left of it in the end, and nothing is kept without a bridge."""
    asked: list[int] = []
    run, keep, found = shortest_path.projection_input, PruningModule.keep_channels, []
    most: list[int] = []
    batches: set[int] = set()
    monkeypatch.setattr(shortest_path, "projection_input", lambda *a: asked.append(a[1]) or run(*a))

    def kept(self: Any, *args: Any) -> None:
        keep(self, *args)
        batches.add(args[0])
        most.append(len(self.mlp_channels))

    monkeypatch.setattr(PruningModule, "keep_channels", kept)
    for number, room in enumerate((states.CHANNELS, 10_000, 0)):
        monkeypatch.setattr(states, "CHANNELS", room)
        asked.clear()
        most.clear()
        folder = tmp_path / str(number)
        folder.mkdir()
        method: Any = ShortestPath(windows=1, bridge=3)
        record = Record(LAYERS, folder / "record.jsonl")
        module = prune(folder, method=method, model=tiny_model(layers=LAYERS, seed=5), target=4, record=record)
        found.append([step.scores for step in module.record.steps])
        assert (not asked) == (number == 0) and (max(most) == 0) == (number == 2) and not module.mlp_channels
    assert found[0] == found[1] == found[2]
    assert batches == {0, 1}, "of three: those of four windows"
    batches.clear()
    every = Refit("down", "step", folds=2, final=False)  # its passes run on all windows
    prune(tmp_path / "step", method=ShortestPath(windows=1, bridge=1), target=4, refit=every)
    assert batches == {0}
    most.clear()
    measured(tiny_model(layers=LAYERS), ShortestPath())
    prune(tmp_path / "plain", method=ShortestPath(windows=1, bridge=0), target=4)
    prune(tmp_path / "disk", method=ShortestPath(windows=1, bridge=3), target=4, cache="disk")
    prune(tmp_path / "elsewhere", method=ShortestPath(windows=1, bridge=3), target=4, offload="cpu")
    assert not most


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_a_divergence_without_anything_in_the_gaps_is_that_of_a_model_without_the_layers(family: str):
    dense = tiny_model(family, layers=LAYERS, seed=2)
    module = measured(dense, ShortestPath(windows=4, bridge=0))
    decoder, nats, tokens = Decoder(dense), 0.0, 0
    for row, real in zip(IDS, MASK):
        at = [p - int(real.long().argmax()) for p in range(0, len(real), EVERY) if real[p]]
        with torch.no_grad():
            ends = decoder.run(row[real][None]), decoder.run(row[real][None], skip=[1, 4, 5])
            p, q = (F.log_softmax(decoder.logits(e)[0, at].double(), -1) for e in ends)
        nats, tokens = nats + float((p.exp() * (p - q)).sum()), tokens + len(at)
    assert BridgedModel(module, 4, 0).divergence([(1, 2), (4, 6)]) == pytest.approx(nats / tokens, rel=1e-3)


def test_it_is_solved_on_windows_that_are_not_measured():
    module = measured(tiny_model(layers=LAYERS), ShortestPath())
    assert BridgedModel(module, 2, 2).measured == [(0, slice(0, 2))]
    assert BridgedModel(module, 2, 2).solved == [(1, slice(0, 2))]
    assert BridgedModel(module, 1, 2).solved == [(0, slice(1, 2)), (1, slice(0, 1))]
    alone = BridgedModel(module, 4, 8)
    assert alone.solved == alone.measured == [(0, slice(0, 2)), (1, slice(0, 2))], "there are no others"
    assert BridgedModel(module, 3, 0).solved == []


@pytest.mark.parametrize("bridge", [0, 2])
@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_a_run_drops_the_best_of_the_paths(bridge: int, cache: Any, tmp_path: Path):
    """What the record says was measured is measured here again, in another order; and it drops what costs least."""
    dense = tiny_model(layers=7, seed=5)
    method: Any = ShortestPath(windows=2, bridge=bridge, gaps=2, slack=0.0)
    record = Record(7, tmp_path / "record.jsonl")
    run = prune(tmp_path, method=method, model=dense, target=4, record=record, cache=cache)
    kept = [group[0] for group in run.record.groups]
    dropped = tuple(layer for layer in range(7) if layer not in kept)
    module = PruningModule()
    module.attach(dense, Record(7), needs=method.needs, span=1)
    for index, batch in enumerate(run.batches):
        module.training_step({"input_ids": batch["input_ids"], "mask": batch["mask"]}, index)
    model = BridgedModel(module, 2, bridge)
    model_alone = [model.divergence([(layer, layer + 1)]) for layer in range(1, 7)]
    first = run.record.steps[0].scores
    assert first["repaired_divergence"][0] is None
    assert first["repaired_divergence"][1:] == pytest.approx(model_alone, rel=1e-5)
    together = [t for t in first["path_divergence"] if t is not None]
    assert len(together) == 2
    found = model.divergence(gaps_of(dropped))
    assert min(together) == pytest.approx(found, rel=1e-5) and len(dropped) == 3
    gap_costs = {gap: model.divergence([gap]) for gap in gaps_of(dropped)}
    for gap, cost in gap_costs.items():
        assert first["gap_divergence"][gap[0] : gap[1]] == pytest.approx([cost] * (gap[1] - gap[0]), rel=1e-5)
    assert [layer for layer, value in enumerate(first["gap_divergence"]) if value is not None] == list(dropped)
    order = sorted(gap_costs, key=lambda gap: gap_costs[gap])
    in_turn = dense_order([step.layers[0] for step in run.record.steps], 7)
    assert in_turn == [layer for gap in order for layer in range(*gap)]


def test_a_run_that_was_cut_goes_on_with_the_plan(tmp_path: Path):
    method: Any = ShortestPath(windows=2, bridge=2)
    model = tiny_model(layers=7, seed=8)
    runs = []
    for name, cut in (("whole", False), ("half", True)):
        record = Record(7, tmp_path / name / "record.jsonl")
        (tmp_path / name).mkdir()
        settings: dict[str, Any] = {"method": method, "model": model, "target": 3, "refit": Refit("down")}
        if cut:
            prune(tmp_path / name, record=record, trainer={"max_steps": 1}, **settings)
            record = Record.read(tmp_path / name / "record.jsonl", 7)
            assert len(record.steps) == 1
        runs.append(prune(tmp_path / name, record=record, **settings))
    assert len(runs[0].record.steps) > 1, "otherwise nothing was cut"
    assert lines(runs[0]) == lines(runs[1])
    assert runs[0].record.layers == 3 and runs[0].record.steps[1].scores.get("path_divergence") is None


def test_layer_0_stays_and_numbers_are_numbers():
    module = measured(tiny_model(layers=5), ShortestPath())
    with pytest.raises(NoSite, match="keeps layer 0, and 5 of 5 layers are to go"):
        ShortestPath()(module, {}, module.record, remove=5)
    assert ShortestPath()(module, {}, module.record, remove=4).step.layers == [1]
    for wrong in ("windows", "gaps"):
        with pytest.raises(ValueError, match=f"{wrong} 0: at least 1"):
            ShortestPath(**{wrong: 0})
    for option in ({"bridge": -1}, {"slack": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} -.*: at least 0"):
            ShortestPath(**option)  # type: ignore[arg-type]
    gemma = measured(tiny_model("gemma2", layers=5), ShortestPath())
    with pytest.raises(ValueError, match="bridge 16 is not possible for gemma2.*give --method.bridge 0"):
        ShortestPath()(gemma, {}, gemma.record, remove=2)
    assert ShortestPath(bridge=0)(gemma, {}, gemma.record, remove=2).step.kind == "drop"
    broken = PruningModule()
    broken.attach(tiny_model(layers=5), Record(5), needs=frozenset({"streams"}), span=1)
    with torch.no_grad():
        broken.teacher_model.lm_head.weight[3] = math.nan
    broken.training_step({"input_ids": IDS[:2], "mask": MASK[:2]}, 0)
    with pytest.raises(NotFinite, match="overflows"):
        ShortestPath()(broken, {}, broken.record, remove=2)


def test_costs_are_measured_where_paths_come_by(monkeypatch: pytest.MonkeyPatch):
    """With costs that add up, and long gaps somewhat dearer: the best of all sets of each number of gaps, found from
    fewer costs than there are."""
    depth, remove, most = 12, 5, 3
    draw = random.Random(3)
    alone = [0.2 + 5 * draw.random() ** 2 for _ in range(depth)]
    asked: set[tuple[Any, ...]] = set()

    def cost(gap: tuple[int, int]) -> float:
        return sum(alone[gap[0] : gap[1]]) * (0.8 + 0.1 * (gap[1] - gap[0]))

    def divergence(self: Any, gaps: Any) -> float:
        asked.add(tuple(gaps))
        return sum(map(cost, gaps))

    monkeypatch.setattr(BridgedModel, "divergence", divergence)
    module = measured(tiny_model(layers=depth), ShortestPath())
    plan, singles, together = ShortestPath(gaps=most, slack=0.0).plan(module, remove)
    best: dict[int, float] = {}
    for dropped in itertools.combinations(range(1, depth), remove):
        gaps = gaps_of(dropped)
        best[len(gaps)] = min(best.get(len(gaps), math.inf), sum(map(cost, gaps)))
    assert together == pytest.approx([best[count] for count in range(1, most + 1)])
    chosen = gaps_of(tuple(layer for layer in range(depth) if plan[layer] is not None))
    assert sum(map(cost, chosen)) == pytest.approx(min(together)) and singles[0] is None
    few, _, _ = ShortestPath(gaps=most, slack=10.0).plan(module, remove)
    [gap] = gaps_of(tuple(layer for layer in range(depth) if few[layer] is not None))
    assert cost(gap) == pytest.approx(best[1]) and best[1] > min(together), "one gap, where more may cost"
    single = {gap for path in asked if len(path) == 1 for gap in path}
    assert len(single) < sum(depth - length for length in range(1, remove + 1)), "not all of them"


def test_bars_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step for each set of gaps that is measured, and one for each layer that is repaired."""
    moved: dict[str, int] = {}

    class Bar(tqdm):
        def close(self) -> None:
            if not self.disable:
                moved[self.desc.rstrip(": ")] = self.n
            super().close()

    for place in ("methods.shortest_path", "refit"):
        monkeypatch.setattr(f"come_pl.pruning.{place}.tqdm", Bar)
    measured_sets: list[Any] = []
    divergence = BridgedModel._divergence
    monkeypatch.setattr(BridgedModel, "_divergence", lambda *a: measured_sets.append(a[1]) or divergence(*a))
    module = prune(
        tmp_path,
        method=ShortestPath(windows=2, bridge=2),
        target=4,
        refit=Refit("down", "end", ahead=0, final=False, folds=2),
    )
    lowest = next(i for i, group in enumerate(module.record.groups) if len(group) > 1)
    assert moved == {"choosing layers": len(measured_sets), "repairing": 4 - lowest} and min(moved.values()) > 0


def test_a_gap_that_costs_less_than_its_layers_is_found(monkeypatch: pytest.MonkeyPatch):
    """Before it is measured a gap is taken to be cheap; else one that is would never be looked at."""

    def divergence(self: Any, gaps: Any) -> float:
        return sum(1.6 if gap == (6, 8) else end - first for gap in gaps for first, end in [gap])

    monkeypatch.setattr(BridgedModel, "divergence", divergence)
    module = measured(tiny_model(layers=12), ShortestPath())
    plan, _, together = ShortestPath(gaps=1).plan(module, 2)
    assert [layer for layer, cost in enumerate(plan) if cost is not None] == [6, 7] and together == [1.6]


@pytest.mark.parametrize("method, options", [("shortest_path", {"bridge": 3}), ("replaceme", {})])
def test_a_family_that_a_method_cannot_take_is_refused_before_weights_are_read(
    method: str, options: dict[str, Any], tmp_path: Path
):
    """There are none in the folder, and no tokenizer."""
    tiny_model("gemma2", layers=4).config.save_pretrained(tmp_path / "model")
    refused = PruningModule(str(tmp_path / "model")), CalibrationData(), Trainer(logger=False)
    with pytest.raises(ValueError, match="not possible for gemma2: a norm stands between"):
        run(*refused, method=method, options=options, target_layers=3, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_stands_in_goes_by_the_repair():
    for refit, expected in ((Refit("all"), 16), (Refit("none"), 0)):
        assert _selecting({"bridge": None}, refit) == {"bridge": expected}
        assert _selecting({"bridge": 3}, refit) == {"bridge": 3}
