"""Shortest path: drop the layers that cost least together once each gap is repaired. Our own; for runs that repair.

A gap (a, b) drops the dense layers a … b − 1. Its cost is that of the dense model without them, where the MLP of the
layer below gives as much of what is missing as its output projection can, as a repair would have it (`refit.py`):

    Δ = argmin_Δ Σ_t w_t ‖T_b − h_a − Δ x‖² + λ s ‖Δ‖²,   w_t = 1 / mean_c(T_a²);      h_b = h_a + Δ x
    cost(a, b) = mean_t KL(dense ‖ dense with this gap),   nats a token, at every fourth position

h_a is the stream before the gap, T_a the dense one there, T_b the dense one after it, x the input of `down_proj` in
layer a − 1; Δ is solved on windows of its own and stays nowhere. All gaps that begin at a have the same x and w, so
that x and Σ w x xᵀ are computed once for all of them, as far as `KEPT` holds them.

1.  Costs add up nearly, as far as gaps are apart. For each number of gaps, up to `gaps`, the set with the least sum is
    a shortest path through the boundaries 0 … L whose edges are kept layers (free) and gaps, found by dynamic
    programming. Layer 0 stays: a repair needs a layer below each gap.
2.  Costs are measured as paths come to need them. Until then a gap is taken to cost nine tenths of its layers one by
    one, and no less than any gap inside it: most that were measured cost more. Three quarters led to the same choice on
    two texts, after three and five times as many.
3.  Each of these sets is then measured as a whole, gap after gap, each Δ solved on what the layers below give by then.
    This is where what does not add up is seen. The fewest gaps win whose divergence is at most `slack` above the
    least: a few windows tell no more than that, and a repair makes up better for one long gap than for several.

A few tokens, the first above all, have a stream that is hundreds of times larger than that of the others from one
layer on to near the top. Δ, made for the others, loses them; a repair of all layers does not. So where such a token is
large on both sides of a gap, or on neither, it gets the dense stream.

Without `bridge` nothing stands in for a gap, which gives the divergence of plain drops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from come_pl import memory
from come_pl.decoder import Family
from come_pl.pruning import head
from come_pl.pruning.batches import inputs_of
from come_pl.pruning.methods.base import Decision, NoSite
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import Planned, rounded
from come_pl.pruning.module import NotFinite, PruningModule
from come_pl.pruning.race import Look
from come_pl.pruning.regression import NormalEquations, folds_of, token_weights
from come_pl.record import Record
from come_pl.taps import layer_run, losses_and_divergences, projection_input, stream_at

Gap = tuple[int, int]  # the first layer that is dropped, and the first above it that stays
Costs = tuple[list[float | None], list[float | None], list[float | None]]  # see `ShortestPath.plan`
EVERY = 4  # positions of a window whose logits are looked at: the head is dear, and neighbours say much the same
MASSIVE = 100.0  # mean square of a token's stream, in units of the window's median, from which it is massive
BRIDGE = 16  # windows that Δ is solved on
FOLDS = 2  # regressions have at least two; a sum over them is what is solved
STRENGTH = 0.3  # λ: what the search of a repair finds for some thousand tokens; to choose layers that will do
KEPT = 2 * 2**30  # bytes of x and Σ w x xᵀ that are kept; those of one layer are, whatever their size
OPTIMISM = 0.9  # what a gap is taken to cost before it is measured, in units of its layers one by one


@dataclass
class Below:
    """What the layer below gaps that begin at one layer has in the dense model.

    Attributes:
        x: the input of its down_proj, of each window (windows, seq, ffn).
        a: Σ w x xᵀ (FOLDS, ffn, ffn).
    """

    x: list[Tensor]
    a: Tensor


def _every(values: Tensor) -> Tensor:
    """Those at the positions (windows, seq, …) that are looked at."""
    return values[:, ::EVERY]


class BridgedModel:
    """The dense model with gaps in it, for which the layers below them stand in.

    Args:
        module: whose student is the dense model still, with streams of its first windows.
        windows: calibration windows of all processes that divergences are measured on.
        bridge: windows after those that Δ is solved on; where there are none, on those measured. 0: no Δ.
        bar: moved by one for each set of gaps that is measured.
    """

    @torch.inference_mode()
    def __init__(self, module: PruningModule, windows: int, bridge: int, bar: tqdm | None = None):
        self.module, self.depth, self.repaired, self.bar = module, len(module.student), bridge > 0, bar
        share = module.monitored(windows)
        self.measured: list[Look] = list(share.items())
        self.solved: list[Look] = []
        if bridge:
            for index, rows in module.monitored(windows + bridge).items():
                rest = slice(share[index].stop if index in share else 0, rows.stop)
                self.solved += [(index, rest)] * (rest.start < rest.stop)
            if not float(module.sum(torch.tensor(float(len(self.solved))))):
                self.solved = list(self.measured)
        # each window once, whatever it is for
        self.looks = self.measured + [look for look in self.solved if look not in self.measured]
        self.final = [self._final(look, self.depth, self._dense(look, self.depth)) for look in self.measured]
        self.told: list[head.Divergence] = []  # of each window that is measured, where it can be had of the head
        if head.predictable(module) and module.student.model.dtype == torch.float32:
            self.told = [head.Divergence(module.student, _every(final).flatten(0, 1)) for final in self.final]
        self.massive = [self._massive(look) for look in self.looks]
        self._known: dict[tuple[Gap, ...], float] = {}
        self._below: dict[int, Below] = {}  # by where gaps begin
        seqlen, ffn = module.batches[0]["input_ids"].shape[1], module.student.geometry.ffn
        # the same on all processes, which compute what they have not kept together
        one = 8 * FOLDS * ffn**2 + 4 * -(-(windows + bridge) // module.world) * seqlen * ffn
        self._room = max(1, KEPT // one)
        for index, _ in self.looks:
            folds_of(module.batches[index], FOLDS)  # asked of the batch: parts of it have it then

    def _dense(self, look: Look, boundary: int) -> Tensor:
        return self.module.stream(look[0], boundary)[look[1]]

    def _inputs(self, look: Look) -> tuple[Tensor, Tensor | None]:
        return inputs_of(self.module.part(look))

    def _final(self, look: Look, start: int, hidden: Tensor) -> Tensor:
        return self.module.student.run(*self._inputs(look), start=start, hidden=hidden)

    def _massive(self, look: Look) -> Tensor:
        """(boundaries, windows, seq): whether a token's stream is massive there."""
        mask, found = self.module.part(look)["mask"], []
        for boundary in range(self.depth + 1):
            size = self._dense(look, boundary).float().square().mean(-1)
            usual = size.where(mask, math.nan).nanmedian(1, keepdim=True).values
            found.append((size > MASSIVE * usual) & mask)
        return torch.stack(found)

    @torch.inference_mode()
    def divergence(self, gaps: Sequence[Gap]) -> float:
        """KL(dense ‖ this), nats a token, with these gaps, from the lowest up; infinite where it is not a number."""
        key = tuple(gaps)
        if key not in self._known:
            self._known[key] = self._divergence(key)
            if self.bar is not None:
                self.bar.update()
        return self._known[key]

    def _divergence(self, gaps: tuple[Gap, ...]) -> float:
        module, looks, reach = self.module, self.looks, int(self.repaired)  # layers below a gap that stand in
        # before the gap, or, if it is bridged, before the layer below it; None: the dense model's
        streams = None if self.repaired else [self._dense(look, gaps[0][0]) for look in looks]
        spared = [massive.any(0) for massive in self.massive]
        for number, (first, end) in enumerate(gaps):
            last = number + 1 == len(gaps)
            if streams is None or self.repaired:
                streams = self._across(streams, first, end, last)
            if last:
                looks = self.measured
            for place, look in enumerate(looks):
                if self.repaired:
                    spared[place] &= self.massive[place][first] == self.massive[place][end]
                    streams[place] = torch.where(spared[place][..., None], self._dense(look, end), streams[place])
                if not last:
                    inputs, below_next = self._inputs(look), gaps[number + 1][0] - reach
                    streams[place] = stream_at(module.student, below_next, *inputs, start=end, hidden=streams[place])
        assert streams is not None, "there is a gap"
        sums = torch.zeros(2, dtype=torch.float64, device=module.device)
        for place, look in enumerate(looks):
            found = self._nats(place, self._final(look, gaps[-1][1], streams[place]))
            sums += torch.stack([found.sum(dtype=torch.float64), _every(module.part(look)["mask"]).sum().double()])
        nats, tokens = module.sum(sums).tolist()
        return rounded(nats / max(tokens, 1.0)) if math.isfinite(nats) else math.inf

    def _nats(self, place: int, final: Tensor) -> Tensor:
        """KL(dense ‖ that of the final states), of some positions of windows that are measured; 0 at padding."""
        student, final = self.module.student, _every(final)
        ids, mask = (_every(self.module.part(self.measured[place])[name]) for name in ("input_ids", "mask"))
        if self.told:
            return self.told[place](final.flatten(0, 1)).view(mask.shape).where(mask, 0.0)
        return losses_and_divergences(student, final, student, _every(self.final[place]), ids, mask)[1]

    def _across(self, streams: Sequence[Tensor] | None, first: int, end: int, last: bool) -> list[Tensor]:
        """The streams after a gap, from those before the layer below it (None: the dense model's), of all windows or,
        for the last gap, of those that are measured."""
        module, geometry = self.module, self.module.student.geometry
        below = self._dense_below(first) if streams is None else None
        equations = NormalEquations(
            geometry.ffn, geometry.hidden, FOLDS, False, module.device, None if below is None else below.a
        )
        found = []
        for place, look in enumerate(self.looks):
            hidden = None if streams is None else streams[place]
            if below is None:
                out, x = self._layer(look, first, hidden)
            else:
                out, x = self._dense(look, first), below.x[place]
            if look in self.solved:
                self._add(equations, look, first, x, self._dense(look, end).float() - out.float())
            # an x is wide, and wanted no more once it is added up
            found.append((out, x if look in self.measured or not last else None))
        change = equations.summed(module.add_up).at(STRENGTH)
        return [
            out if change is None else (out.float() + x.float() @ change.T).to(out.dtype)
            for out, x in found
            if x is not None
        ]

    def _add(self, equations: NormalEquations, look: Look, first: int, x: Tensor, lacks: Tensor) -> None:
        batch = self.module.part(look)
        weights = token_weights(self._dense(look, first), batch["mask"], "inverse")
        with self.module.student.mixed():
            equations.add_windows(batch, x, lacks, weights)

    def _layer(self, look: Look, first: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output of the layer below a gap, input of its down_proj) on the stream `hidden`, by default the dense one,
        whose output is known."""
        if hidden is None:
            return self._dense(look, first), self._dense_x(look, first)
        student = self.module.student
        return layer_run(student, first - 1, student.family.mlp_output, *self._inputs(look), hidden)

    def _dense_x(self, look: Look, first: int) -> Tensor:
        known = self.module.mlp_channels.get((look[0], first - 1))
        if known is not None:
            return known[look[1]]
        student, hidden = self.module.student, self._dense(look, first - 1)
        return projection_input(student, first - 1, student.family.mlp_output, *self._inputs(look), hidden)

    def _dense_below(self, first: int) -> Below | None:
        """What all gaps that begin there have in common; None where there is no memory for it."""
        if not self.module.in_memory:
            return None
        if first not in self._below:
            if len(self._below) >= self._room:
                del self._below[next(iter(self._below))]  # the oldest
            geometry = self.module.student.geometry
            inputs = [self._dense_x(look, first) for look in self.looks]
            equations = NormalEquations(geometry.ffn, 0, FOLDS, False, self.module.device)
            for look, x in zip(self.looks, inputs, strict=True):
                if look in self.solved:
                    self._add(equations, look, first, x, x[..., :0].float())
            self._below[first] = Below(inputs, equations.summed(self.module.add_up).a)
        return self._below[first]


def shortest_paths(depth: int, remove: int, most: int, cost: Callable[[Gap], float]) -> dict[int, list[Gap]]:
    """For each number of gaps from 1 to `most` that is possible: those with the least sum of costs that drop `remove`
    of `depth` layers; of equal sums the one with the lowest layers. Layer 0 is kept, and a layer between gaps."""
    # (boundary, layers dropped, gaps) → (sum, gaps), for paths whose last edge is a kept layer
    best: dict[tuple[int, int, int], tuple[float, list[Gap]]] = {(1, 0, 0): (0.0, [])}
    found: dict[int, tuple[float, list[Gap]]] = {}
    for boundary in range(1, depth + 1):
        for dropped in range(remove + 1):
            for count in range(most + 1):
                if (boundary, dropped, count) not in best:
                    continue
                total, gaps = best[boundary, dropped, count]
                edges = [(boundary, boundary)] if boundary < depth else []
                if count < most:
                    edges += [
                        (boundary, end) for end in range(boundary + 1, min(boundary + remove - dropped, depth) + 1)
                    ]
                for gap in edges:
                    new = (total + cost(gap), [*gaps, gap]) if gap[1] > boundary else (total, gaps)
                    state = (gap[1] + 1, dropped + gap[1] - boundary, len(new[1]))
                    if state not in best or new < best[state]:
                        best[state] = new
    for count in range(1, most + 1):
        ends = [best[state] for state in ((depth, remove, count), (depth + 1, remove, count)) if state in best]
        if ends:
            found[count] = min(ends)
    return {count: gaps for count, (_, gaps) in found.items()}


class ShortestPath(Planned):
    """Dropping the set of layers that costs least with every gap repaired; the cheapest gap goes first, layer by layer.

    Args:
        windows: Calibration windows that divergences are measured on.
        bridge: Windows after those on which it is solved for what the layers below gaps can give; where there are none,
            those that are measured. 0: nothing stands in for a gap. Without it, 16, or 0 in a run without --refit.
        gaps: Most gaps that the layers may be dropped in.
        slack: By how much more divergence fewer gaps may cost, as a share of the least.
    """

    needs = frozenset({"streams"})
    span = 1
    progressive = False

    def __init__(self, windows: int = 4, bridge: int | None = None, gaps: int = 5, slack: float = 0.05, **options: Any):
        super().__init__(**options)
        bridge = BRIDGE if bridge is None else bridge
        check(windows=(windows, 1), bridge=(bridge, 0), gaps=(gaps, 1), slack=(slack, 0))
        self.windows, self.bridge, self.gaps, self.slack = windows, bridge, gaps, slack
        self.pass_windows = windows + bridge
        self.channel_windows = self.pass_windows if bridge else 0

    def check(self, family: Family, layers: int, remove: int) -> None:
        if remove > layers - 1:
            raise NoSite(f"shortest_path keeps layer 0, and {remove} of {layers} layers are to go")
        if self.bridge and not family.linear_outputs:
            raise ValueError(
                f"bridge {self.bridge} is not possible for {family.name}: a norm stands between its output projections "
                "and the stream; give --method.bridge 0"
            )

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        more = {}
        if record.steps:
            plan, alone = (record.steps[0].scores[name] for name in ("gap_divergence", "repaired_divergence"))
        else:
            plan, alone, together = self.plan(module, remove)
            more = {"path_divergence": together}
        alive = self.left(record)
        cheapest = min((layer for layer in alive if plan[layer] is not None), key=lambda layer: (plan[layer], layer))
        decision = self.drop(module, [alive.index(cheapest)], "gap_divergence", [plan[layer] for layer in alive])
        decision.step.scores |= {"repaired_divergence": [alone[layer] for layer in alive]} | more
        return decision

    def plan(self, module: PruningModule, remove: int) -> Costs:
        """(cost of the gap that each dense layer is dropped in, None for those that stay; cost of each alone, None for
        layer 0; divergence of the best set of each number of gaps, all of them repaired)."""
        depth = len(module.student)
        self.check(module.student.family, depth, remove)
        with tqdm(desc="choosing layers", unit="gap", leave=False, disable=module.global_rank > 0) as bar:
            found = self._plan(BridgedModel(module, self.windows, self.bridge, bar), depth, remove)
        module.mlp_channels.clear()
        memory.give_back()  # several GiB, which a repair would leave in pieces
        return found

    def _plan(self, model: BridgedModel, depth: int, remove: int) -> Costs:
        costs = {(layer, layer + 1): model.divergence([(layer, layer + 1)]) for layer in range(1, depth)}

        def estimate(gap: Gap) -> float:
            if gap not in guesses:
                first, end = gap
                inner = max(estimate((first + 1, end)), estimate((first, end - 1)))
                guesses[gap] = max(OPTIMISM * sum(costs[i, i + 1] for i in range(first, end)), inner)
            return guesses[gap]

        while True:
            guesses = dict(costs)
            paths = shortest_paths(depth, remove, self.gaps, estimate)
            unknown = sorted({gap for path in paths.values() for gap in path} - set(costs))
            if not unknown:
                break
            costs |= {gap: model.divergence([gap]) for gap in unknown}
        together = {count: model.divergence(path) for count, path in paths.items()}
        least = min(together.values())
        if least == math.inf:
            raise NotFinite(
                "the divergence without the layers that cost least is not finite; the model overflows in this dtype"
            )
        best = min(count for count, divergence in together.items() if divergence <= (1 + self.slack) * least)
        plan: list[float | None] = [None] * depth
        for gap in paths[best]:
            plan[gap[0] : gap[1]] = [costs[gap]] * (gap[1] - gap[0])
        alone = [costs[layer, layer + 1] for layer in range(1, depth)]
        return plan, [None, *alone], [together.get(count) for count in range(1, self.gaps + 1)]
