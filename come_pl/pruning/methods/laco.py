"""LaCo: collapse a window of layers into its first wherever the model's final states hardly change (arXiv 2402.11187).

    θ_l ← θ_l + Σ_{k=1..m} (θ_{l+k} − θ_l),  layers l+1 … l+m removed              m = C − 1
    s   = mean over windows of cos(flatten(states of the original), flatten(states of the candidate))   (after the norm)
    l   = H − C;  while l ≥ L:  if s(l) > T: merge, l ← l − I;  else l ← l − 1

Formula above: `paper`, blend coefficients (1 − m, 1, …, 1). `released` is what the published code computes and its
numbers come from, (0, …, 0, 1): each difference is taken from the sum so far, so that the last layer's projections
stay, with the first layer's norms. `mean`: (1/C, …, 1/C). Published settings: Llama-2-13B C=7 I=1 H=39 L=0 T=0.45 on 5
sentences; Baichuan2-13B C=3 I=1 T=0.6.

The depth of the run is reached exactly: m is capped by what is left to remove, and where a sweep ends before (or no T
is given) T is lowered just so far that one merge is found: the window with the highest similarity of a whole sweep.

Differs from the released code in: the target depth; a candidate is one blended layer and a run from it upward, on the
first `windows` calibration windows without padding (there: a copy of the model, short sentences, fp32 on the CPU).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from come_pl.decoder import Decoder
from come_pl.pruning.batches import inputs_of
from come_pl.pruning.methods.base import Decision, Method, NoSite
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import rounded
from come_pl.record import Record, Step
from come_pl.surgery import blend

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

Merge = Literal["released", "paper", "mean"]


def coefficients(merge: Merge, m: int) -> list[float]:
    """What a layer and the m after it are multiplied by in their sum."""
    return {"released": [0.0] * m + [1.0], "paper": [1.0 - m] + [1.0] * m, "mean": [1 / (m + 1)] * (m + 1)}[merge]


class LaCo(Method):
    """LaCo: windows of layers become one layer while the final states stay similar to the original's.

    Args:
        merge: Weights of a merged window: released (the last layer's projections, as in the published code), paper
            (the published formula), or mean.
        C: Layers of a window, which become one.
        I: Layers that the search goes down after a merge.
        L: Lowest layer that a window may begin at.
        H: Layer below which the first window ends; by default all layers, as far as there are.
        T: Similarity, in [-1, 1], above which a window is merged; where it ends the search above the target depth, or
            is not given, the most similar window is merged.
        windows: Calibration windows that the similarity is taken over, rounded up to whole batches; all without it.
    """

    needs = frozenset({"streams"})

    def __init__(
        self,
        merge: Merge = "released",
        C: int = 4,
        I: int = 2,  # noqa: E741
        L: int = 0,
        H: int | None = None,
        T: float | None = None,
        windows: int | None = 8,
    ):
        check(merge=(merge, Merge), C=(C, 2), I=(I, 1), L=(L, 0), windows=(windows, 1))
        check(T=(T, -1), H=(H, L + 2))
        self.merge, self.C, self.I, self.L, self.H, self.T, self.windows = merge, C, I, L, H, T, windows
        self._reference: tuple[Decoder, dict[int, Tensor]] | None = None  # whose, by batch

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        depth, full = record.layers, min(self.C - 1, remove)
        top = min(record.layers if self.H is None else self.H, depth) - full - 1
        begin = record.steps[-1].layers[0] - self.I if record.steps else top
        found: dict[tuple[int, int], float] = {}  # (first layer, m) → similarity

        def similar(site: int, m: int) -> float:
            if (site, m) not in found:
                value = self.similarity(module, site, m, reference)
                found[site, m] = value if math.isfinite(value) else -math.inf
            return found[site, m]

        reference = self.reference(module)
        chosen = None
        if self.T is not None:
            down = ((site, min(full, depth - site - 1)) for site in range(min(begin, depth - 2), self.L - 1, -1))
            chosen = next((place for place in down if similar(*place) > self.T), None)
        if chosen is None:
            places = [(site, full) for site in range(top, self.L - 1, -1)]
            chosen = max(places, key=lambda place: similar(*place), default=None)
            if chosen is None or found[chosen] == -math.inf:
                raise NoSite(
                    f"no window of {full + 1} layers between L={self.L} and H={self.H or depth} can be merged, at "
                    f"{depth} layers; widen the range, take a smaller C, or give a larger --target_layers"
                )
        site, m = chosen
        step = Step("blend", list(range(site, site + m + 1)), coefficients(self.merge, m), norm="first")
        seen = {place: value for (place, _), value in sorted(found.items())}
        step.scores = {"final_similarity": [seen.get(place) for place in range(depth - m)]}
        return Decision(step)

    @torch.inference_mode()
    def reference(self, module: PruningModule) -> dict[int, Tensor]:
        """Final states (batch, seq, hidden) of the original model, by batch; run once, for it does not change."""
        if self._reference is None or self._reference[0] is not module.teacher:
            self._reference = (module.teacher, {})
        found = self._reference[1]
        for index in module.first_batches(self.windows):
            if index not in found:
                batch = module.batches[index]
                found[index] = module.teacher.run(*inputs_of(batch)).cpu()
        return found

    @torch.inference_mode()
    def similarity(self, module: PruningModule, site: int, m: int, reference: dict[int, Tensor]) -> float:
        """Mean over windows of the cosine between the original's final states and those of the student with layers
        site … site + m merged."""
        student = module.student
        layer = blend(student, list(student.layers[site : site + m + 1]), coefficients(self.merge, m), "first")
        sums = torch.zeros(2, dtype=torch.float64, device=module.device)
        for index, original in reference.items():
            batch = module.batches[index]
            counted = batch["mask"][..., None]
            final = student.run(
                *inputs_of(batch),
                start=site,
                hidden=module.stream(index, site) if site else None,
                swap={site: layer},
                skip=range(site + 1, site + m + 1),
            )
            a, b = (x.float().where(counted, 0).flatten(1).double() for x in (final, original.to(final.device)))
            lengths = a.norm(dim=1) * b.norm(dim=1)
            sums[0] += ((a * b).sum(1) / lengths.clamp(min=1e-12)).sum()
            sums[1] += batch["mask"].any(1).sum()
        cosine, windows = module.sum(sums).tolist()
        return rounded(cosine / max(windows, 1))
