"""Repair in closed form: output projections are solved for so that a layer gives what the dense model gave there.

A student layer stands for a group of dense layers. Its job is known exactly: from the stream that it really gets (the
student's) to the teacher's stream after the group. With everything else fixed that is linear least squares in
`down_proj` (and, before it, in `o_proj`), from the same calibration windows, folded into the weights that are there:

    W ← W + argmin_Δ Σ_t w_t ‖T_t − out_t − Δ x_t‖² + λ s ‖Δ‖²       w_t = 1 / mean_c(T_tc²)

T is the teacher's stream, out the layer's own output with W, x the projection's input. The token weights keep massive
activations (tokens whose stream is hundreds of times larger, the first above all) from owning the fit. λ is chosen on
calibration windows that the fit has not seen, and a fit that does no better there than no change is not used.

`--refit all` also repairs what a layer reads. The layers above the first change get another stream than they were made
for; what their norms give is led back towards what the dense layer's norms gave there, by a map M = I + Δ, folded into
the projections that read it (query, key, value; gate and up): W ← W M, from the same kind of regression.

With `--refit_channels group`, a layer that stands for several dense ones gets the MLP channels of all of them that
matter most (`channels.py`), unless that leaves more error on unseen windows than its own.

`--refit_when step` repairs after each step, so that the next one is chosen on a repaired student; `end` once at the
target depth, from the lowest changed layer upward, each layer on the stream that the repaired ones below give.

In these passes the layers below a long gap begin what it was there for. One layer with its few thousand features makes
a poor linear model of many; so the n layers below one that stands for dense layers k … e − 1 have as targets

    T_end + j / (n + 1) · (T_e − T_{k+1}),   j = 1 … n from the lowest up;   n = min(ahead, dense layers gone / 2)

One that cannot (three quarters of what it lacks are left on unseen windows; low in the model, layers cannot) is
repaired again, for its own end only.

Last, the gains of the final norm are fitted (`final_norm.py`), and the output projections of the last layers are solved
for together, for what the head makes of them (`last_layers.py`).

Not from a paper: ReplaceMe (arXiv 2505.02819) solves for a matrix after the MLP of the layer before a cut; this is
the same idea for any projection of any group, with the student's own input and unseen windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from come_pl.decoder import Family
from come_pl.pruning import channels, last_layers
from come_pl.pruning.batches import inputs_of
from come_pl.pruning.regression import Fit, NormalEquations, Weighting, token_weights
from come_pl.record import Record, Step
from come_pl.surgery import put_back, set_weights
from come_pl.taps import layer_run, projection_input

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

Parts = Literal["auto", "best", "none", "down", "both", "all"]
When = Literal["auto", "step", "end"]
Source = Literal["own", "group"]
ENOUGH = 0.75  # share of what it lacks, on unseen windows, that a layer below a gap may still lack to begin it
TIE = 1.02  # error of all channels, in units of its own's, that is no more: equal there, they gave the better model
Gap = tuple[float, int, int]  # a share of what lies between two boundaries of the teacher's stream


def check_family(family: Family) -> None:
    """Raises ValueError: a family whose layer outputs are not linear in the output projections."""
    if not family.linear_outputs:
        raise ValueError(
            f"refit is not possible for {family.name}: a norm stands between its output projections and the stream; "
            "use --refit none, without --sweep"
        )


class Refit:
    """Closed-form repair after a step, and sweeps over all later layers at the end.

    Args:
        parts: What is solved for: none, down (the MLP's output projection), both (the attention's before it), all (what
            the layers above the first change read, too). best: all, or none for a family that cannot be repaired; what
            runs where no method is given. auto: down for CoMe as it is by default here, none for any other method and
            with --preset paper.
        when: step: after each step. end: once, at the target depth, every layer from the lowest changed one up. auto:
            step for CoMe, whose choices are made on repaired layers, end for any other method.
        sweep: Passes of refits over every layer from the lowest changed one up, once the target depth is reached; at
            least one with `when: end`.
        weighting: What a token counts for: inverse (of the mean square of its target), or uniform.
        folds: Parts that calibration windows are dealt into; the strength of the ridge is chosen on unseen ones.
        ahead: Layers below a gap that begin to give what it gave, in passes at the end; fewer below a short gap.
        channels: What the MLP of a layer that stands for several dense layers is made of, with `all`: own, its own
            channels; group, the most important ones of all of them, unless that is clearly worse on unseen windows.
        final: Once the target depth is reached, fit the gains of the final norm to what the dense model predicts and to
            the text (`come_pl/pruning/final_norm.py`).
        last: After the gains, and only then, solve for the output projections of so many of the last layers, for the
            same (`come_pl/pruning/last_layers.py`). 0: none. auto: at most 12, what 8 GiB hold; 1 with --offload.
    """

    def __init__(
        self,
        parts: Parts = "auto",
        when: When = "auto",
        sweep: int = 0,
        weighting: Weighting = "inverse",
        folds: int = 4,
        ahead: int = 2,
        channels: Source = "group",
        final: bool = True,
        last: int | Literal["auto"] = "auto",
    ):
        if channels not in ("own", "group"):
            raise ValueError(f"channels {channels!r}: expected own or group")
        if ahead < 0:
            raise ValueError(f"ahead {ahead}: the number of layers below a gap is not negative")
        if sweep < 0:
            raise ValueError(f"sweep {sweep}: the number of passes is not negative")
        if sweep and parts == "none":
            raise ValueError(f"sweep {sweep} needs --refit down, both or all: a sweep is made of refits")
        if last != "auto" and last < 0:
            raise ValueError(f"last {last}: the number of layers is not negative")
        if folds < 2:
            raise ValueError(f"folds {folds}: a strength chosen on unseen windows needs at least 2")
        self.parts, self.when, self.sweep, self.weighting, self.folds = parts, when, sweep, weighting, folds
        self.ahead, self.channels, self.final, self.last = ahead, channels, final, last
        self._guess: dict[str, float] = {}

    def resolved(self, method: str, family: Family, affordable: int = last_layers.LAYERS) -> Refit:
        """What `best` and `auto` mean for a method and a family (`affordable`: for `last`); sweeps ask for refits."""
        parts, when, last = self.parts, self.when, self.last
        if parts == "best":
            parts = "all" if family.linear_outputs else "none"
        if parts == "auto":
            parts = "down" if (method == "come" or self.sweep) and family.linear_outputs else "none"
        if parts == "all" and method == "fusegpt":
            raise ValueError(
                "--refit all leads what layers read back to the dense weights, and fusegpt has trained them; give "
                "--refit both"
            )
        if parts != "none" or self.sweep:
            check_family(family)
        if when == "auto":
            when = "step" if method == "come" else "end"
        if last == "auto":
            last = affordable
        return Refit(**(self.settings | {"parts": parts, "when": when, "last": last}))

    @property
    def on(self) -> bool:
        return self.parts in ("down", "both", "all")

    @property
    def sweeps(self) -> int:
        """Passes over the layers at the target depth."""
        return max(self.sweep, int(self.when == "end")) if self.on else 0

    @property
    def ends(self) -> bool:
        """Whether something is repaired at the target depth only."""
        return self.on and (self.sweeps > 0 or self.final)

    @property
    def settings(self) -> dict[str, Any]:
        """For the run's identity and its `run.json`."""
        names = ("parts", "when", "sweep", "weighting", "folds", "ahead", "channels", "final", "last")
        return {name: getattr(self, name) for name in names}

    @property
    def needs(self) -> frozenset[str]:
        """What the calibration pass before a step keeps for it."""
        return frozenset({"streams"} if self.on and self.when != "end" else ())

    def after(self, module: PruningModule, step: Step, record: Record, last: bool) -> None:
        """Refit what a step (already done to the student and in the record) left behind; adds to its weights.

        Args:
            last: the target depth is reached, so that sweeps follow.
        """
        if not self.on or (self.when == "end" and not last):
            return
        module.check_folds(self.folds)
        self._guess.clear()  # a run that was taken up again must find the same
        errors: list[float | None] = [None] * len(module.student)
        shares: dict[int, float] = {}
        weights = dict(step.weights or {})
        if self.when != "end":
            index = max(step.layers[0] - (step.kind == "drop"), 0)
            self._layer(module, record, index, weights, errors, shares)
            module.changed_from(min(index, module.start))
        if last:
            gaps = self.gaps_ahead(record)
            lowest = min([next(i for i, group in enumerate(record.groups) if len(group) > 1), *gaps])
            for sweep in range(self.sweeps):
                module.changed_from(lowest)
                if sweep + 1 == self.sweeps:
                    module.keep_only({last_layers.lowest(module.student, self.last)} if self.final else (), lowest)
                module.reach(lowest)
                layers = range(lowest, len(module.student))
                for layer in tqdm(layers, "repairing", leave=False, unit="layer", disable=module.global_rank > 0):
                    restore = _memory(module, layer, weights)
                    self._layer(module, record, layer, weights, errors, shares, gaps.get(layer, ()))
                    error = errors[layer]
                    if layer in gaps and sweep == 0 and (error is None or error > ENOUGH):
                        del gaps[layer]
                        restore()
                        errors[layer] = None
                        self._layer(module, record, layer, weights, errors, shares)
                    module.advance(layer)
            if self.final:
                module.reach(len(module.student))
                weights |= last_layers.repaired_head(module, self.folds, self.last)
        step.weights = weights or None
        step.scores["refit_error"] = errors
        if shares:
            step.scores["channels_kept"] = [shares.get(layer) for layer in range(record.teacher_layers)]

    def gaps_ahead(self, record: Record) -> dict[int, list[Gap]]:
        """For student layers below long gaps: what each begins to give of them."""
        found: dict[int, list[Gap]] = {}
        for index, group in enumerate(record.groups):
            count = min(self.ahead, (len(group) - 1) // 2, index)
            for step in range(1, count + 1):
                gap = (step / (count + 1), group[0] + 1, group[-1] + 1)
                found.setdefault(index - count - 1 + step, []).append(gap)
        return found

    def _layer(
        self,
        module: PruningModule,
        record: Record,
        index: int,
        weights: dict[str, Tensor],
        errors: list[float | None],
        shares: dict[int, float],
        gaps: Sequence[Gap] = (),
    ) -> None:
        family, end = module.student.family, record.groups[index][-1] + 1
        module.begin_repair(index)
        source = record.sources[index] if self.parts == "all" else None
        before, left, repaired = 0.0, 0.0, False  # the layer's error
        for path, reads in (
            (family.attention_output, (family.query, family.key, family.value)),
            (family.mlp_output, family.mlp_inputs),
        ):
            concatenates = path == family.mlp_output and self._concatenates(record, index)
            if concatenates:  # the channels may be a mixture, from a step or sweep before
                self._set(module, index, channels.dense(module, index, record.sources[index]), weights)
            if source is not None:
                self._reads(module, index, source, reads, weights)
            if self.parts == "down" and path != family.mlp_output:
                continue
            fit, left = self._output(module, index, path, end, gaps)
            before = before or left
            if concatenates:
                fit, left, kept = self._concatenated(module, record, index, fit, left, weights, gaps)
                for layer in record.groups[index]:  # an earlier sweep may have found otherwise
                    shares.pop(layer, None)
                shares.update(kept)
            if fit is not None:
                projection = module.student.part(module.student.layers[index], path)
                self._set(module, index, {path: fit.added_to(projection)}, weights)
                left, repaired = left * fit.error, True
        if repaired:
            errors[index] = float(f"{left / before:.6g}")

    def _output(
        self, module: PruningModule, index: int, path: str, end: int, gaps: Sequence[Gap]
    ) -> tuple[Fit | None, float]:
        """(the fit of an output projection, the error without it)."""
        equations = self.equations(module, index, path, end, gaps=gaps)
        return self._solved(path, equations), float(equations.c.sum())

    def _concatenates(self, record: Record, index: int) -> bool:
        """Whether a layer is to have channels of other layers: it was one dense layer and stands for several."""
        whole = record.sources[index] is not None
        return self.parts == "all" and self.channels == "group" and whole and len(record.groups[index]) > 1

    def _concatenated(
        self,
        module: PruningModule,
        record: Record,
        index: int,
        fit: Fit | None,
        left: float,
        weights: dict[str, Tensor],
        gaps: Sequence[Gap],
    ) -> tuple[Fit | None, float, dict[int, float]]:
        """Give a layer the most important channels of all dense layers that it stands for, unless its own leave clearly
        less error on unseen windows.

        Args:
            fit, left: what `_output` gives for its own.

        Returns:
            What `_output` gives for those that it has then, and the share that is kept of the channels of each dense
            layer (nothing: they are its own).
        """
        family, group, source = module.student.family, record.groups[index], record.sources[index]
        assert source is not None

        def led(layer: int, reads: Callable[[int], Tensor]) -> Fit | None:
            path = family.mlp_inputs[0]
            return self._solved(f"{path} of others", self.input_equations(module, index, layer, path, reads))

        def counts(number: int) -> Tensor:
            target = module.teacher_stream(number, group[-1] + 1)
            return token_weights(target, module.batches[number]["mask"], self.weighting)

        new, shares = channels.concatenated(module, index, group, led, counts)
        restore = _memory(module, index, weights)
        self._set(module, index, new, weights)
        other_fit, other_left = self._output(module, index, family.mlp_output, group[-1] + 1, gaps)
        if shares[source] < 1 and _unseen(other_fit, other_left) < TIE * _unseen(fit, left):
            return other_fit, other_left, shares
        restore()
        return fit, left, {}

    def _reads(
        self, module: PruningModule, index: int, source: int, paths: Sequence[str], weights: dict[str, Tensor]
    ) -> None:
        self._set(module, index, channels.read_by(module, source, index, paths), weights)  # may have been led before
        fit = self._solved(paths[0], self.input_equations(module, index, source, paths[0]))
        if fit is not None:
            layer = module.student.layers[index]
            self._set(module, index, {path: fit.before(module.student.part(layer, path)) for path in paths}, weights)

    def _set(
        self, module: PruningModule, index: int, changed: dict[str, dict[str, Tensor]], weights: dict[str, Tensor]
    ) -> None:
        new = {f"{index}.{path}.{name}": value for path, own in changed.items() for name, value in own.items()}
        weights.update(set_weights(module.student, new))
        module.inputs.changed(module.student, [path for path, own in changed.items() if own])

    def _solved(self, path: str, equations: NormalEquations) -> Fit | None:
        fit = equations.solve(self._guess.get(path))
        if fit is not None:
            self._guess[path] = fit.strength
        return fit

    @torch.inference_mode()
    def input_equations(
        self,
        module: PruningModule,
        index: int,
        source: int,
        path: str,
        reads: Callable[[int], Tensor] | None = None,
    ) -> NormalEquations:
        """Sums, over all processes, of the regression, on what projection `path` of student layer `index` gets, of what
        that of teacher layer `source` gets more; each token counts the same, as both come out of a norm.

        Args:
            reads: the number of a batch → what the student's projection gets, where that is known.
        """
        student, teacher = module.student, module.teacher
        equations = NormalEquations(student.geometry.hidden, student.geometry.hidden, self.folds, False, module.device)
        for number, batch in enumerate(module.batches):
            x = module.reads(number, index, path) if reads is None else reads(number)
            wanted = projection_input(teacher, source, path, *inputs_of(batch), module.teacher_stream(number, source))
            with student.mixed():
                equations.add_windows(batch, x, wanted.float() - x.float(), batch["mask"].float())
        return equations.summed(module.add_up)

    @torch.inference_mode()
    def equations(
        self,
        module: PruningModule,
        first: int,
        path: str,
        end: int,
        layer: nn.Module | None = None,
        place: int | None = None,
        windows: int | None = None,
        gaps: Sequence[Gap] = (),
    ) -> NormalEquations:
        """Sums, over all processes, of the regression of what a layer lacks on the input of its projection `path`.

        Args:
            first: boundary of the student's stream that the layer gets.
            end: boundary of the teacher's stream that it must give (times what drops above it scaled the stream by).
            layer: by default student layer `first`.
            place: the layer index that it runs as; by default `first`.
            windows: only the first so many of all processes, rounded up to whole batches.
            gaps: what it must give beside that.
        """
        student, place = module.student, first if place is None else place
        projection = student.part(layer or student.layers[place], path)
        outputs, features = projection.weight.shape
        equations = NormalEquations(features, outputs, self.folds, projection.bias is not None, module.device)
        wanted = [(1.0, end)]
        for share, low, high in gaps:
            wanted += [(share, high), (-share, low)]
        scales = [module.record.scale_at(boundary) for _, boundary in wanted]
        for number in module.first_batches(windows):
            batch, hidden = module.batches[number], module.stream(number, first)
            target = torch.zeros_like(hidden, dtype=torch.float32)
            for (share, boundary), scale in zip(wanted, scales, strict=True):
                target.add_(module.teacher_stream(number, boundary).float(), alpha=share * scale)
            with module.inputs.used(student, None if layer else first, number):
                out, x = layer_run(student, place, path, *inputs_of(batch), hidden, layer)
            weight = token_weights(target, batch["mask"], self.weighting)
            with student.mixed():
                equations.add_windows(batch, x, target - out.float(), weight)
        return equations.summed(module.add_up)


def _unseen(fit: Fit | None, left: float) -> float:
    return left if fit is None else left * fit.error


def _memory(module: PruningModule, index: int, weights: dict[str, Tensor]) -> Callable[[], None]:
    """A function that gives student layer `index` its present parameters again, and `weights` what is in it now."""
    layer, before = module.student.layers[index], dict(weights)
    parameters = dict(layer.named_parameters())

    def restore() -> None:
        put_back(layer, parameters)
        module.inputs.begin(index)
        weights.clear()
        weights.update(before)

    return restore
