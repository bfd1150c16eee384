"""What a run mixes of two devices, on a pretended accelerator: there is none where these tests run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerator import DEVICE, Accelerator
from conftest import tiny_ids, tiny_model

from come_pl.decoder import family_of
from come_pl.pruning.methods import METHODS
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Record


def run(method: str, refit: Refit, family: str, **options: Any) -> set[str]:
    """Two layers of five go; what was mixed."""
    there, model, record = Accelerator(), tiny_model(family, layers=5), Record(5)
    way = METHODS[method](**options)
    refit = refit.resolved(method, family_of(model.config))
    module = PruningModule(monitor=2)
    module.attach(model, record, needs=way.needs | refit.needs, span=way.span)
    module._device = DEVICE
    ids = tiny_ids(windows=8, seq=24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, 20:] = False
    there.put(model, ids, mask)
    with there:
        while record.layers > 3:
            module.needs, module.pass_windows = way.needs_for(record) | refit.needs, None
            module.sites.begin(way.sites(record, record.layers - 3))
            there.put(*(getattr(module.statistics, name) for name in module.statistics._defaults))
            for batch in range(2):
                rows = slice(4 * batch, 4 * batch + 4)
                module.training_step({"input_ids": ids[rows], "mask": mask[rows]}, batch)
            statistics = module.statistics.compute() if module.needs - {"streams"} else {}
            module.sites.settle(statistics, module.span)
            decision = way(module, statistics, record, remove=record.layers - 3)
            module.do(decision.step, decision.layer)
            record.append(decision.step)
            refit.after(module, decision.step, record, last=record.layers == 3)
        module.monitor()
    return there.mixed


@pytest.mark.parametrize(
    ("method", "refit", "family", "options"),
    [
        ("shortest_path", Refit("all", folds=2), "llama", {"windows": 2, "bridge": 6}),
        ("prune_comp", Refit("all", when="step", folds=2), "opt", {}),
        ("shortgpt", Refit("both", sweep=2, folds=2), "qwen3", {}),
        ("come", Refit("none"), "gemma", {"norm": "fold", "race": True}),
        ("come", Refit("down", folds=2), "llama-biases", {"select": "local"}),
        ("come_p", Refit("none"), "llama", {"granularity": 4, "race": True}),
        ("sleb", Refit("none"), "mistral", {"bridge": 4, "windows": 4}),
        ("taylor", Refit("none"), "llama", {}),
        ("mka", Refit("none"), "llama", {}),
        ("laco", Refit("none"), "llama", {}),
        ("replaceme", Refit("none"), "llama", {}),
        ("fusegpt", Refit("none"), "llama", {"epochs": 0}),
        ("streamline", Refit("none"), "llama", {"epochs": 0}),
        ("magnitude", Refit("none"), "gemma", {}),
    ],
)
def test_devices_are_not_mixed(method: str, refit: Refit, family: str, options: Any) -> None:
    assert run(method, refit, family, **options) == set()


def test_what_is_mixed_is_seen() -> None:
    with Accelerator() as there:
        a, b = torch.ones(2, device=DEVICE), torch.ones(2)
        assert a.device == DEVICE and b.device.type == "cpu"
        assert not there.mixed and (a * 2 + a.sum().cpu()).device == DEVICE
        assert not there.mixed and a.cpu().device.type == "cpu"
        a.cpu() * b, a[torch.tensor([0])], b.to(a) + a, b.to(DEVICE) + a
        assert not there.mixed
        a * b
        assert len(there.mixed) == 1
        b[torch.zeros(1, dtype=torch.long, device=DEVICE)]
        assert len(there.mixed) == 2
