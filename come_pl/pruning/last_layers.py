"""The output projections of the last layers, solved for together for what the head makes of them.

Least squares leads each layer towards the dense model's stream, all of its directions alike; what counts is what is
predicted in the end. With W the weights of `o_proj` and `down_proj` of the last layers, u(W) the final state after the
norm, y what the dense model and the text say follows (`head.py`):

    min over W   Σ_t  lse(H u_t(W)) − y_t · u_t(W)                              H: the head

by steps of Newton's method with a curvature in factors, one pair for each projection (K-FAC, Martens and Grosse, ICML
2015). With x what a projection gets, g the gradient of the loss at what it gives:

    W ← W − G⁻¹ (Σ_t g_t x_tᵀ / T) A⁻¹,   A = Σ_t x̂_t x̂_tᵀ / T,   G = Σ_t ĝ_t ĝ_tᵀ / T

ĝ is the same with the next token instead of y, times |h|, x̂ = x / |h|, and |h| the root mean square of the stream where
these layers begin: norms divide by about that, so that massive activations would own A otherwise. G ⊗ A + λ Ḡ Ā I is
what is inverted, Ḡ and Ā mean diagonals, λ, one for all, that of the least loss on windows that the step has not seen
(their first halves: that tells strengths apart as well, for half of the time);
a step that is no better there is not taken. No learning rate. Pairs know nothing of each other, so that λ grows with
their number.

It learns from the text as well as from the dense model, and on text of another kind gains less (benchmarks/README.md).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from come_pl.decoder import Decoder, Geometry
from come_pl.offload import present, stored
from come_pl.pruning import final_norm, head
from come_pl.pruning.batches import inputs_of
from come_pl.pruning.head import Expected, Targets
from come_pl.pruning.regression import add_outer, folds_of, mirror
from come_pl.surgery import FINAL_NORM, put_back, set_weights
from come_pl.taps import stream_at, targets_of

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

LAYERS = 12  # at most, where it is not said how many
MOST_GIB = 8.0  # that these may take then
TOKENS = 16384  # predicted tokens of all processes that are looked at, in whole windows; twice as many gave no more
CURVED = 8192  # of these, curvature is taken from about so many: from all of twice as many tokens it gave no more
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(3, 11))  # 32 … 100,000
STRENGTH = 1000.0  # about what a layer needs: where the search begins, times their number
STEPS = 2  # a third brought little, and each reads the tokens again
Factors = tuple[Tensor, Tensor]  # of a positive matrix: eigenvalues, eigenvectors


def affordable(geometry: Geometry, offloaded: bool = False) -> int:
    """How many layers, where that is not said: `LAYERS`, or as many as `MOST_GIB` holds, but at least one; one for a
    model that is not in memory. It goes by the model, not by the machine, which must not change what comes out."""
    sizes = [(geometry.hidden, width) for width in (geometry.heads * geometry.head_dim, geometry.ffn)]
    held = sum(8 * (rows * columns + rows**2 + columns**2) + 12 * rows * columns for rows, columns in sizes)
    return 1 if offloaded else max(1, min(LAYERS, int(MOST_GIB * 2**30 / held)))


def _counted(student: Decoder, layers: int | Literal["auto"]) -> int:
    return affordable(student.geometry) if layers == "auto" else layers


def lowest(student: Decoder, layers: int | Literal["auto"]) -> int:
    """The first of so many last layers."""
    return max(len(student) - _counted(student, layers), 0)


def repaired_head(module: PruningModule, folds: int, layers: int | Literal["auto"]) -> dict[str, Tensor]:
    """What goes by predictions: the final norm's gains (`final_norm.py`), then this for so many layers. The student has
    the new weights, and they are returned by the names of `surgery.set_weights`."""
    new: dict[str, Tensor] = {}
    student = module.student
    layers = _counted(student, layers)
    gains = final_norm.gains(module, folds)
    if gains is not None:
        new |= set_weights(student, {f"{FINAL_NORM}.weight": gains})
    own = projections(module, folds, layers) if layers else {}
    if own:
        new |= set_weights(student, own)
        module.changed_from(min(int(name.split(".")[0]) for name in own))
    return new


def projections(module: PruningModule, folds: int, layers: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """The new weights, in their dtype, by the names of `surgery.set_weights`; none where none are better on unseen
    windows.

    Args:
        folds: calibration windows are dealt into so many parts; the first that has any is not fitted to.
        layers: how many, where there are as many. Of each, several times its output projections are in memory.
        tokens: about so many predicted tokens are looked at.
    """
    student = module.student
    if not head.predictable(module) or not student.family.linear_outputs:
        return {}
    last = _Last(module, layers)
    seen, unseen = _windows(module, folds, tokens, last.lowest)
    if not _everywhere(module, seen, unseen):  # of few windows chance may have left out all of one kind
        seen, unseen = _windows(module, folds, math.inf, last.lowest)
    if not _everywhere(module, seen, unseen):
        return {}
    factors: dict[str, tuple[Factors, Factors]] = {}  # they hardly change from one step to the next
    change = head.newton(
        torch.zeros(sum(last.sizes), device=module.device),
        lambda change: last.loss(unseen, change),
        lambda change: last.step(last.derivatives(seen, change, not factors), factors),
        STRENGTHS,
        min(STRENGTHS, key=lambda strength: abs(math.log(strength / (STRENGTH * layers)))),
        STEPS,
    )
    return {} if change is None else last.with_change(change)


@dataclass(eq=False)
class Window:
    """A calibration window with at least one predicted token.

    Attributes:
        inputs: of the student's forward: token ids, and what the model gets as its attention mask.
        hidden: the stream where the layers begin (1, seq, hidden).
        counted: (seq − 1,), True where a token is predicted.
        at: y and the next token of these tokens.
        size: the root mean square of the stream at these (tokens, 1).
        curved: whether curvature is taken from it, too.
    """

    inputs: tuple[Tensor, Tensor | None]
    hidden: Tensor
    counted: Tensor
    at: Targets
    size: Tensor
    curved: bool = True

    def begin(self) -> Window:
        """Its first half, if anything is predicted there: the model is causal, so that nothing else changes."""
        length = max(2, -(-self.hidden.shape[1] // 2))
        counted = self.counted[: length - 1]
        tokens = int(counted.sum())
        if not tokens:
            return self
        ids, mask = self.inputs
        inputs = (ids[:, :length].contiguous(), None if mask is None else mask[:, :length].contiguous())
        at, size = Targets(self.at.y[:tokens], self.at.following[:tokens]), self.size[:tokens]
        return replace(
            self, inputs=inputs, hidden=self.hidden[:, :length].contiguous(), counted=counted, at=at, size=size
        )


def _everywhere(module: PruningModule, *parts: list[Window]) -> bool:
    """Whether there are windows in each part, of all processes together."""
    return all(int(module.sum(torch.tensor(len(part)))) for part in parts)


@torch.no_grad()  # no inference mode: autograd goes through
def _windows(module: PruningModule, folds: int, tokens: float, lowest: int) -> tuple[list[Window], list[Window]]:
    """(what is fitted to, the beginnings of what is not) of this process. Which windows goes by their content, not by
    the process or the batch that they are in."""
    stride = max(1, round(module.targets() / tokens))
    curved = stride * max(1, round(module.targets() / stride / CURVED))
    seen: list[Window] = []
    unseen: list[Window] = []
    left_out, targets = module.unseen_fold(folds), head.targets(module)
    for number, batch in enumerate(module.batches):
        content = batch["input_ids"].sum(1) // folds
        picked = (content % stride == 0) & targets_of(batch["mask"]).any(1)
        rows = picked.nonzero().squeeze(1).tolist()
        if not rows:
            continue
        hidden = module.stream(number, lowest)
        dense = module.teacher.final_norm(module.teacher_stream(number, len(module.teacher)))
        for row in rows:
            part = module.part((number, slice(row, row + 1)))
            counted = targets_of(part["mask"])[0]
            following = part["input_ids"][0, 1:][counted]
            y = targets(dense[row, :-1][counted], following)
            own = hidden[row : row + 1].clone()
            size = own[0, :-1][counted].float().square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
            inputs = inputs_of(part)
            bends = bool(content[row] % curved == 0)
            window = Window(inputs, own, counted, Targets(y, following), size, bends)
            if folds_of(batch, folds)[row] == left_out:
                unseen.append(window.begin())
            else:
                seen.append(window)
    return seen, unseen


@dataclass
class Derivatives:
    """Means over tokens, fp64, of one projection: gradient (out, in), and G (out, out) and A (in, in), or neither."""

    gradient: Tensor
    curvature: tuple[Tensor, Tensor] | None

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return (self.gradient, *(self.curvature or ()))


@dataclass
class Run:
    """One layer's forward, with its graph.

    Attributes:
        inputs, outputs: of its output projections, by name, in the order in which they run.
        hidden, output: the stream before and after it (1, seq, hidden).
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    hidden: Tensor
    output: Tensor


class _Last:
    """The last layers of the student, and changes of their output projections: as one vector, of all projections.

    Attributes:
        lowest: the first of the layers.
        parts: name → projection.
    """

    def __init__(self, module: PruningModule, layers: int):
        self.module, self.student = module, module.student
        self.lowest = lowest(self.student, layers)
        self.in_memory = not stored(self.student.model)
        family = self.student.family
        self.parts: dict[str, nn.Linear] = {
            f"{index}.{path}": self.student.part(self.student.layers[index], path)
            for index in range(self.lowest, len(self.student))
            for path in (family.attention_output, family.mlp_output)
        }
        self.sizes = [part.weight.numel() for part in self.parts.values()]

    def split(self, change: Tensor) -> dict[str, Tensor]:
        """Name → change (out, in)."""
        each = zip(self.parts.items(), change.split(self.sizes), strict=True)
        return {name: own.view(part.weight.shape) for (name, part), own in each}

    def with_change(self, change: Tensor) -> dict[str, Tensor]:
        """The projections' changed weights, in their dtype, by the names of `surgery.set_weights`."""
        new = {}
        for name, own in self.split(change).items():
            weight = self.parts[name].weight
            with present(weight):
                new[f"{name}.weight"] = (weight.float() + own.to(weight.device)).to(weight.dtype)
        return new

    @contextlib.contextmanager
    def _changed(self, change: Tensor) -> Iterator[None]:
        """Within it the projections are changed."""
        if not bool(change.any()):
            yield
            return
        before = [(layer, dict(layer.named_parameters())) for layer in self.student.layers[self.lowest :]]
        set_weights(self.student, self.with_change(change))
        try:
            yield
        finally:
            for layer, parameters in before:
                put_back(layer, parameters)

    def _states(self, window: Window) -> Tensor:
        """Final states (tokens, hidden) of what is predicted from."""
        found = self.student.run(*window.inputs, start=self.lowest, hidden=window.hidden)
        return found[0, :-1][window.counted]

    @torch.no_grad()
    def loss(self, windows: list[Window], change: Tensor) -> float:
        """Nats a token, up to a constant."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.module.device)
        with self._changed(change):
            for window in windows:
                states = self._states(window).float()
                sums[0] += head.nats(self.module, window.at, states.__getitem__)
                sums[1] += len(window.at)
        nats, tokens = self.module.sum(sums).tolist()
        return head.mean(nats, tokens)

    @torch.no_grad()
    def derivatives(self, windows: list[Window], change: Tensor, factors: bool) -> dict[str, Derivatives]:
        """Of the loss, by projection; G and A only with `factors`. The graph of one window is in memory at a time, or,
        where matrices are elsewhere, of one layer."""
        sums = {name: _zeros(part, factors) for name, part in self.parts.items()}
        curved = [window for window in windows if window.curved]
        if not _everywhere(self.module, curved):  # few windows, none of which has been picked
            curved = windows
        with self._changed(change):
            expected = Expected(self.student, self.student.model.get_output_embeddings().weight)
            for window in windows:
                self._add(window, sums, factors and window in curved, expected)
        tokens, bent = (self._tokens(some) for some in (windows, curved))
        for total in sums.values():
            for square in total.curvature or ():
                mirror(square)
            for value in total.sums:
                self.module.add_up(value)
                value.div_(tokens if value is total.gradient else bent)
        return sums

    def _tokens(self, windows: list[Window]) -> float:
        return float(self.module.sum(torch.tensor(float(sum(len(window.at) for window in windows)))))

    def _add(self, window: Window, sums: dict[str, Derivatives], factors: bool, expected: Expected) -> None:
        runs: dict[int, Run] = {}
        hidden, layers = [window.hidden], range(self.lowest, len(self.student))
        for index in layers:
            if self.in_memory:
                runs[index] = self._run(index, window, hidden[-1])
                hidden.append(runs[index].output.detach())
            else:  # a graph keeps the weights of its layer
                hidden.append(stream_at(self.student, index + 1, *window.inputs, start=index, hidden=hidden[-1]))
        slopes = self._slopes(window, hidden.pop(), factors, expected)
        for index in reversed(layers):
            before = hidden.pop()
            with present(self.student.layers[index]):  # for autograd, too
                run = runs.pop(index) if self.in_memory else self._run(index, window, before)
                found, slopes = self._back(run, window, slopes)
            with self.student.mixed():
                for name, (x, slope, *own) in found.items():
                    total = sums[name]
                    total.gradient += (slope.T @ x).double()
                    if total.curvature and own:
                        add_outer(total.curvature[0], own[0] * window.size)
                        add_outer(total.curvature[1], x / window.size)

    def _slopes(self, window: Window, stream: Tensor, factors: bool, expected: Expected) -> list[Tensor]:
        """Of the loss and, with `factors`, of the nats of the next tokens, at the stream after the last layer
        (1, seq, hidden)."""
        weight, norm = self.student.model.get_output_embeddings().weight, self.student.final_norm
        state = stream[0, :-1][window.counted].detach().requires_grad_()
        with torch.enable_grad():
            normed = norm(state)
        own = expected(normed.detach())
        found = []
        for wanted in (window.at.y, weight[window.at.following].float())[: 1 + factors]:
            [slope] = torch.autograd.grad(normed, state, (own - wanted).to(normed.dtype), retain_graph=True)
            whole = torch.zeros_like(stream)
            whole[0, :-1][window.counted] = slope
            found.append(whole)
        return found

    def _run(self, index: int, window: Window, hidden: Tensor) -> Run:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def seen(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        hidden = hidden.detach().requires_grad_(index > self.lowest)
        own = {name: part for name, part in self.parts.items() if name.startswith(f"{index}.")}
        handles = [part.register_forward_hook(functools.partial(seen, name)) for name, part in own.items()]
        try:
            with torch.enable_grad():
                output = stream_at(self.student, index + 1, *window.inputs, start=index, hidden=hidden)
        finally:
            for handle in handles:
                handle.remove()
        return Run(inputs, outputs, hidden, output)

    def _back(self, run: Run, window: Window, slopes: list[Tensor]) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Through one layer: ({projection: [its input, slopes of each kind at its output], (tokens, channels), fp32},
        slopes of each kind at the layer's input; those at the lowest layer's are not asked for)."""
        at = [*run.outputs.values(), *([run.hidden] if run.hidden.requires_grad else [])]
        found = [torch.autograd.grad(run.output, at, slope, retain_graph=slope is not slopes[-1]) for slope in slopes]

        def rows(value: Tensor) -> Tensor:
            return value.reshape(len(window.counted) + 1, -1)[:-1][window.counted].float()

        told = {
            name: [rows(x), *(rows(each[place]) for each in found)]
            for place, (name, x) in enumerate(run.inputs.items())
        }
        return told, [each[-1] for each in found]

    def step(
        self, found: dict[str, Derivatives], factors: dict[str, tuple[Factors, Factors]]
    ) -> Callable[[float], Tensor]:
        """λ → (G ⊗ A + λ Ḡ Ā I)⁻¹ applied to the gradient, of all projections; not finite where these are not.

        Args:
            found: of each projection; taken out one by one, so that no more is in memory than before.
            factors: of G and A of each projection; filled where `found` has them.
        """
        if not all(bool(value.isfinite().all()) for each in found.values() for value in each.sums):
            return lambda strength: torch.full((sum(self.sizes),), math.inf)
        turned: list[tuple[Tensor, Factors, Factors]] = []
        for name in list(found):
            each = found.pop(name)
            if each.curvature:
                factors[name] = tuple(torch.linalg.eigh(each.curvature[0])), tuple(torch.linalg.eigh(each.curvature[1]))
            g, a = factors[name]
            turned.append((g[1].T @ each.gradient @ a[1], g, a))

        def solved(strength: float) -> Tensor:
            changes = []
            for value, (own_g, basis_g), (own_a, basis_a) in turned:
                curvature = own_g[:, None] * own_a + strength * own_g.mean() * own_a.mean()
                changes.append((basis_g @ (value / curvature) @ basis_a.T).flatten())
            return torch.cat(changes)

        return solved


def _zeros(part: nn.Linear, factors: bool) -> Derivatives:
    def zeros(height: int, width: int) -> Tensor:
        return torch.zeros(height, width, dtype=torch.float64, device=part.weight.device)

    rows, columns = part.weight.shape
    return Derivatives(zeros(rows, columns), (zeros(rows, rows), zeros(columns, columns)) if factors else None)
