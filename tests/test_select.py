"""The choice of site and ratio by refitted error or loss, against a naive search that builds every student."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from conftest import tiny_ids, tiny_model
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning.methods.come import CoMe, keep
from come_pl.pruning.methods.select import GRID, STRENGTHS
from come_pl.pruning.module import PruningModule
from come_pl.record import Record
from come_pl.surgery import concatenate, dominant, replace_span
from come_pl.taps import boundaries, projection_inputs

IDS = tiny_ids(16, 12)
MASK = torch.arange(12) < torch.tensor([12, 8, 12, 5] * 4)[:, None]


def measured(model: Any, method: CoMe, cache: Any = "ram") -> PruningModule:
    module = PruningModule(cache=cache)
    module.attach(model, Record(len(Decoder(model))), needs=method.needs)
    for index in range(4):
        part = slice(4 * index, 4 * index + 4)
        module.training_step({"input_ids": IDS[part], "mask": MASK[part]}, index)
    return module


def student_with(module: PruningModule, site: int, share: float, statistics: dict[str, Tensor]) -> Any:
    """A whole model of its own in which layers site and site + 1 are one, and that layer's index."""
    model = copy.deepcopy(module.student_model)
    decoder, ratio = Decoder(model), [share, 1 - share]
    kept = keep(decoder, [site, site + 1], ratio, statistics)
    new = concatenate(
        decoder, [decoder.layers[site], decoder.layers[site + 1]], kept, ratio, "mean" if 0 < share < 1 else "dominant"
    )
    replace_span(decoder, site, 2, new, site + dominant(ratio))
    return decoder


def refitted_error(decoder: Decoder, teacher: Decoder, site: int) -> tuple[float, Tensor]:
    """(error on unseen halves a token, change of down_proj by the fit to all) of the new layer at `site`."""
    seen: list[Tensor] = []
    with torch.no_grad(), boundaries(teacher) as dense:
        teacher.run(IDS, MASK.long())
    watch = projection_inputs(decoder, site, lambda k, n, x: seen.append(x) if (k, n) == ("mlp", site) else None)
    with torch.no_grad(), boundaries(decoder) as own, watch:
        decoder.run(IDS, MASK.long())
    target = dense[site + 2].double()
    x, r = seen[0].reshape(*MASK.shape, -1).double(), target - own[site + 1].double()
    w = torch.where(MASK, 1 / target.square().mean(-1), 0.0)
    fold = IDS.sum(1) % 2
    assert 0 < int(fold.sum()) < len(fold)

    def fitted(rows: Tensor, strength: float) -> Tensor:
        some_w, some_x, some_r = (t[rows].flatten(0, 1) for t in (w[..., None], x, r))
        a, b = (some_w * some_x).T @ some_x, (some_w * some_x).T @ some_r
        return torch.linalg.solve(a + strength * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype), b)

    nothing = float((w * r.square().sum(-1)).sum())
    errors = {}
    for strength in STRENGTHS:
        errors[strength] = sum(
            float((w * (r - x @ fitted(fold != f, strength)).square().sum(-1))[fold == f].sum()) for f in (0, 1)
        )
    best = min(errors, key=lambda s: errors[s])
    change = fitted(torch.ones_like(fold, dtype=torch.bool), best).T if errors[best] < nothing else torch.zeros(1)
    return min(errors[best], nothing) / int(MASK.sum()), change


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "qwen3", "gemma"])
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_local_is_the_naive_search(family: str, cache: Any) -> None:
    method = CoMe(select="local")
    module = measured(tiny_model(family, layers=5), method, cache)
    statistics = module.statistics.compute()
    decision = method(module, statistics, module.record, remove=2)
    errors = {
        (site, share): refitted_error(student_with(module, site, share, statistics), module.teacher, site)[0]
        for site, share in itertools.product(range(4), GRID)
    }
    best = min(errors, key=lambda k: errors[k])
    assert (decision.step.layers, decision.step.ratio) == ([best[0], best[0] + 1], [best[1], 1 - best[1]])
    for site, error in enumerate(decision.step.scores["refitted_error"]):
        assert error == pytest.approx(min(errors[site, share] for share in GRID), rel=1e-3)
    if 1.0 in decision.step.ratio:
        whole = module.student.layers[best[0] + dominant(decision.step.ratio)]
        before = {name: p.clone() for name, p in whole.named_parameters()}
    module.do(decision.step)  # the step builds its layer itself: the candidate's refit must not be in it
    assert len(module.student) == 4
    if 1.0 in decision.step.ratio:
        assert all(torch.equal(p, before[n]) for n, p in module.student.layers[best[0]].named_parameters())


def test_loss_is_the_naive_search_over_the_best_few() -> None:
    method = CoMe(select="loss")
    module = measured(tiny_model(layers=5), method)
    statistics = module.statistics.compute()
    decision = method(module, statistics, module.record, remove=2)
    found = []
    for site, share in itertools.product(range(4), GRID):
        decoder = student_with(module, site, share, statistics)
        error, change = refitted_error(decoder, module.teacher, site)
        with torch.no_grad():
            decoder.layers[site].mlp.down_proj.weight += change.float()
            logits = decoder.model(input_ids=IDS, attention_mask=MASK.long()).logits[:, :-1].log_softmax(-1)
        nats = -logits.gather(-1, IDS[:, 1:, None]).squeeze(-1)
        counted = MASK[:, 1:] & MASK[:, :-1]
        found.append((error, float(nats[counted].double().mean()), site, share))
    finalists = sorted(found)[: method.selector.finalists]
    _, _, site, share = min(finalists, key=lambda f: f[1])
    assert (decision.step.layers[0], decision.step.ratio) == (site, [share, 1 - share])


def test_only_sites_near_in_span_distance_are_tried_and_merged_layers_may_be_forbidden() -> None:
    method = CoMe(select="local")
    method.selector.sites = 2
    module = measured(tiny_model(layers=6), method)
    decision = method(module, module.statistics.compute(), module.record, remove=2)
    tried = [e < float("inf") for e in decision.step.scores["refitted_error"]]  # type: ignore[operator]
    spans = decision.step.scores["span_distance"]
    assert sum(tried) == 2 and {i for i, t in enumerate(tried) if t} == set(
        sorted(range(len(spans)), key=lambda i: spans[i])[:2]  # type: ignore[arg-type,return-value]
    )


def test_select_chooses_among_pairs_only() -> None:
    with pytest.raises(ValueError, match="merge_item 3"):
        CoMe(select="local", merge_item=3)


@pytest.mark.parametrize("select", ["local", "loss"])
def test_errors_kept_from_the_step_before_are_those_found_anew(select: Any) -> None:
    model, steps = tiny_model(layers=7), []
    for fresh in (False, True):
        method = CoMe(select=select, wo_repeat=False)
        module = measured(model, method)
        for _ in range(3):
            if fresh:
                method = CoMe(select=select, wo_repeat=False)
            decision = method(module, module.statistics.compute(), module.record, remove=3)
            module.do(decision.step)
            module.record.append(decision.step)
            for index in range(4):
                part = slice(4 * index, 4 * index + 4)
                module.training_step({"input_ids": IDS[part], "mask": MASK[part]}, index)
        steps.append([(s.layers, s.ratio, s.scores["refitted_error"]) for s in module.record.steps])
    assert steps[0] == steps[1]
