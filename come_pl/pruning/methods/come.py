"""CoMe: concatenate the most important channels of adjacent layers into one ("Layer as Puzzle Pieces", NeurIPS 2025,
arXiv 2510.15304).

    channel sensitivity   s_c   = mean_t |x_c| · Σ_o |W_oc|       W: down_proj | o_proj, x: its input
    block influence       BI_l  = mean_t 1 − clamp(cos(h_l, h_{l+1}), 0, 1)
    merge site            l*    = argmin_l arccos(cos(h_l, h_{l+m})) / π     (last token of each window)
    merge ratio           r_i   = BI_i^p / Σ_j BI_j^p, the largest raised to at least ρ^(1/(n−1))
    counts                floor(r_i · N) for all but the largest share, which takes the rest
    new layer             top-k channels of each layer by s, in their order, layers in order

n is the number of dense layers inside the group, N the number of KV heads or of FFN neurons; a KV head is scored by the
mean of its query heads' channels. Defaults of the released code: m = 2, p = 1, ρ = 0 (off), norm = mean, last
token, merging again allowed. Here ρ = 0.9, all tokens, and merging again only when nothing else is left
(benchmarks/results/come_settings.csv says why).

Differs from the released code in: query heads follow their own KV head (there, grouped-query models mix heads of other
groups); the last layer's output is taken before the final norm; `skip_method="mka"` merges the last layers, as MKA
does (there, a slip merges layers 0 and 1); an already merged last pair is refused cleanly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from come_pl.decoder import Decoder, Geometry
from come_pl.offload import present
from come_pl.pruning.methods.base import Decision, Method, NoSite
from come_pl.pruning.methods.select import Selector
from come_pl.pruning.sites import Sites
from come_pl.record import Record, Step
from come_pl.surgery import Kept, Norm, dominant

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule


def merge_ratio(influence: Sequence[float], originals: int, p: float = 1.0, rho: float = 0.0) -> list[float]:
    """Share of each layer of a group, summing to 1.

    Args:
        influence: block influence of each layer.
        originals: dense layers inside the group; the floor is rho^(1/(originals − 1)).
        p: exponent on the influence; large p gives the dominant layer nearly everything.
        rho: in [0, 1]; 0 is off.
    """
    top = max(influence)
    if top <= 0:
        ratio = [1 / len(influence)] * len(influence)
    else:
        powers = [(max(b, 0.0) / top) ** p for b in influence]  # relative to the largest, so that nothing underflows
        ratio = [b / sum(powers) for b in powers]
    main = dominant(ratio)
    floor = rho ** (1 / (originals - 1)) if originals > 1 and rho > 0 else 0.0
    if ratio[main] < floor:
        rest = 1 - ratio[main]
        ratio = [floor if i == main else r / rest * (1 - floor) for i, r in enumerate(ratio)]
    # rounded, so that the order in which processes' sums were added leaves no trace; still summing to 1
    ratio = [float(f"{r:.8g}") for r in ratio]
    ratio[main] = 1 - sum(r for i, r in enumerate(ratio) if i != main)
    return ratio


def distribute(ratio: Sequence[float], total: int) -> list[int]:
    """How many of `total` channels each layer gives: floor of its share, the largest share takes the rest."""
    main = dominant(ratio)
    counts = [math.floor(r * total + 1e-9) for r in ratio]  # 0.3 * 10 is 2.9999… in floating point
    counts[main] = total - sum(c for i, c in enumerate(counts) if i != main)
    return counts


def sensitivity(decoder: Decoder, layer: int, statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(score of each KV head (kv_heads,), score of each FFN neuron (ffn,)) of a student layer."""
    family, shape, module = decoder.family, decoder.geometry, decoder.layers[layer]
    scores = []
    for kind, path in (("attention", family.attention_output), ("mlp", family.mlp_output)):
        part = decoder.part(module, path)
        with present(part):
            magnitude = part.weight.abs().sum(0, dtype=torch.float64)
        scores.append(statistics[kind][layer].to(magnitude) * magnitude)
    heads = scores[0].view(shape.kv_heads, shape.heads_per_kv * shape.head_dim).mean(1)
    return heads, scores[1]


def top(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest scores, ascending; the lower index of equals."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def keep(decoder: Decoder, layers: Sequence[int], ratio: Sequence[float], statistics: dict[str, Tensor]) -> list[Kept]:
    """The channels that a concatenation of `layers` with shares `ratio` keeps."""
    return pick(decoder.geometry, [sensitivity(decoder, layer, statistics) for layer in layers], ratio)


def pick(shape: Geometry, scores: Sequence[tuple[Tensor, Tensor]], ratio: Sequence[float]) -> list[Kept]:
    """The most sensitive channels of each layer, as many as its share.

    Args:
        scores: `sensitivity` of each layer.
    """
    heads, neurons = distribute(ratio, shape.kv_heads), distribute(ratio, shape.ffn)
    return [Kept(top(s[0], h), top(s[1], n)) for s, h, n in zip(scores, heads, neurons, strict=True)]


Select = Literal["span", "local", "loss"]


class CoMe(Method):
    """CoMe with the posterior-free merge ratio.

    Args:
        p: Exponent on block influence in the merge ratio.
        rho: Least share of the dominant layer of a pair, in [0, 1]; rho^(1/(n-1)) for a group of n dense layers. 0 is
            off, as in the released code.
        norm: Norms of a new layer: mean (released code), dominant, or fold (each kept channel sees its own layer's).
        merge_item: Layers merged in a step, at least 2.
        wo_repeat: Forbid merging an already merged layer again; by default it is done only when no other site is left.
        skip_method: How the site is chosen: bi (span distance), sleb (least loss with the layers removed), mka (always
            the last layers).
        span_tokens: Tokens that the span distance is taken over: last (of each window) or all.
        select: How site and ratio are chosen: span (by the formulas above), or by what they cost once refitted: local
            (error of the new layer), loss (calibration loss of the best few by that). Pairs only; they need --refit.
        race: Stop measuring sites that are clearly worse than the best after a part of the text, and what lies above
            the best; the same choice unless chance is against it. On one process, without repair after each step.
    """

    needs = frozenset({"channel_intensity", "block_influence", "span_distance"})

    def __init__(
        self,
        p: float = 1.0,
        rho: float = 0.9,
        norm: Norm = "mean",
        merge_item: int = 2,
        wo_repeat: bool | None = None,
        skip_method: Literal["bi", "sleb", "mka"] = "bi",
        span_tokens: Literal["last", "all"] = "all",
        select: Select = "span",
        race: bool = False,
    ):
        if race and (span_tokens != "all" or skip_method != "bi" or select != "span"):
            raise ValueError(
                "race: sites are raced by the span distance of all tokens; it needs select span, "
                "span_tokens all, skip_method bi"
            )
        if select != "span" and merge_item != 2:
            raise ValueError(f"merge_item {merge_item}: select {select} chooses among pairs; give merge_item 2")
        if merge_item < 2:
            raise ValueError(f"merge_item {merge_item}: at least 2 layers are merged in a step")
        if not 0 <= rho <= 1:
            raise ValueError(f"rho {rho}: the least share of the dominant layer lies in [0, 1]")
        if not p >= 0:
            raise ValueError(f"p {p}: the exponent on block influence is not negative")
        self.p, self.rho, self.norm, self.merge_item, self.wo_repeat = p, rho, norm, merge_item, wo_repeat
        self.skip_method, self.span_tokens = skip_method, span_tokens
        self.span, self.select, self.progressive = merge_item, select, merge_item == 2
        self.spares_teacher = select == "span"
        self.race_sites = race
        self.selector = Selector(loss=select == "loss", norm=norm)

    @property
    def by_batches(self) -> bool:
        return super().by_batches or self.select != "span"  # by errors on the first tokens, up to whole batches

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        student = module.student
        count = min(self.merge_item, remove + 1)
        scores = self.site_scores(module, statistics, record, count)
        first = min(range(len(scores)), key=lambda site: scores[site])
        if scores[first] == math.inf:
            raise NoSite(
                f"no {count} adjacent layers are left that were not merged before, at {record.layers} layers; allow "
                "merging again (--method.wo_repeat false) or give a larger --target_layers"
            )
        influence = statistics["block_influence"].tolist()
        # above, a race measured a part of the text, and which part goes by earlier steps
        stop = module.sites.stop
        told = influence if stop is None else influence[:stop] + [None] * (len(influence) - stop)
        if self.select != "span":
            best, errors = self.selector.choose(module, record, scores, lambda a, b: keep(student, a, b, statistics))
            step = Step("merge", best.layers, best.ratio, best.kept, best.norm)
            step.scores = {"block_influence": told, self.score_name: scores, "refitted_error": errors}  # type: ignore[dict-item]
            return Decision(step)
        layers = list(range(first, first + count))
        originals = sum(len(record.groups[i]) for i in layers)
        ratio = merge_ratio([influence[i] for i in layers], originals, self.p, self.rho)
        step = Step("merge", layers, ratio, keep(student, layers, ratio, statistics), self.norm)
        step.scores = {"block_influence": told, self.score_name: scores}  # type: ignore[dict-item]
        return Decision(step)

    def allowed(self, record: Record, count: int) -> list[bool]:
        """Whether layers l … l + count − 1 may be merged, for each l."""
        untouched = [
            all(len(group) == 1 for group in record.groups[site : site + count])
            for site in range(record.layers - count + 1)
        ]
        repeat = self.wo_repeat is False or (self.wo_repeat is None and not any(untouched))
        return [repeat or fresh for fresh in untouched]

    def sites(self, record: Record, remove: int) -> Sites | None:
        count = min(self.merge_item, remove + 1)
        ends = [site + count for site, ok in enumerate(self.allowed(record, count)) if ok]
        return Sites(ends, count) if self.race_sites and ends else None

    @property
    def score_name(self) -> str:
        return {"bi": "span_distance", "sleb": "loss_without", "mka": "distance_from_top"}[self.skip_method]

    def site_scores(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, count: int
    ) -> list[float]:
        """Score of merging layers l … l + count − 1, for each l; infinity where that is forbidden."""
        allowed = self.allowed(record, count)
        sites = len(allowed)
        if self.skip_method == "mka":
            found = [float(sites - 1 - site) for site in range(sites)]
        elif self.skip_method == "sleb":
            found = [
                module.loss(site, skip=range(site, site + count)) if ok else math.inf for site, ok in enumerate(allowed)
            ]
        else:  # the last step may remove fewer layers than the others
            size = "" if count == self.span else f"_{count}"
            found = statistics[f"span_{self.span_tokens}{size}"].tolist()
        return [score if ok else math.inf for score, ok in zip(found, allowed, strict=True)]
