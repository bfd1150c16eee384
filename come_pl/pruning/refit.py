"""Repair in closed form: output projections are solved for so that a layer gives what the dense model gave there.

A student layer stands for a group of dense layers. Its job is known exactly: from the stream that it really gets (the
student's) to the teacher's stream after the group. With everything else fixed that is linear least squares in
`down_proj` (and, before it, in `o_proj`), from the same calibration windows, folded into the weights that are there:

    W ← W + argmin_Δ Σ_t w_t ‖T_t − out_t − Δ x_t‖² + λ s ‖Δ‖²       w_t = 1 / mean_c(T_tc²)

T is the teacher's stream, out the layer's own output with W, x the projection's input. The token weights keep massive
activations (tokens whose stream is hundreds of times larger, the first above all) from owning the fit. λ is chosen on
calibration windows that the fit has not seen, and a fit that does no better there than no change is not used.

Not from a paper: ReplaceMe (arXiv 2505.02819) solves for a matrix after the MLP of the layer before a cut; this is
the same idea for any projection of any group, with the student's own input and unseen windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from come_pl.decoder import Family
from come_pl.pruning.regression import Fit, NormalEquations
from come_pl.record import Record, Step
from come_pl.surgery import set_weights
from come_pl.taps import layer_run

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

Parts = Literal["auto", "none", "down", "both"]
Weighting = Literal["inverse", "uniform"]


def token_weights(target: Tensor, mask: Tensor, weighting: Weighting) -> Tensor:
    """(batch, seq): what each token counts for in a fit; 0 at padding."""
    if weighting == "uniform":
        return mask.float()
    size = target.float().square().mean(-1)
    return torch.where(mask, 1 / size.clamp(min=1e-12), 0.0)


def check_family(family: Family) -> None:
    """Raises ValueError: a family whose layer outputs are not linear in the output projections."""
    if not family.linear_outputs:
        raise ValueError(
            f"refit is not possible for {family.name}: a norm stands between its output projections and the stream; "
            "use --refit none"
        )


class Refit:
    """Closed-form repair after a step, and sweeps over all later layers at the end.

    Args:
        parts: Output projections that are solved for: none, down (of the MLP), both (attention's first), or auto: down
            for CoMe as it is by default here, none for any other method and with --preset paper.
        sweep: Passes of refits over every layer from the lowest changed one up, once the target depth is reached.
        weighting: What a token counts for: inverse (of the mean square of its target), or uniform.
        folds: Parts that calibration windows are dealt into; the strength of the ridge is chosen on unseen ones.
    """

    def __init__(self, parts: Parts = "auto", sweep: int = 0, weighting: Weighting = "inverse", folds: int = 4):
        if sweep < 0:
            raise ValueError(f"sweep {sweep}: the number of passes is not negative")
        if sweep and parts == "none":
            raise ValueError(f"sweep {sweep} needs --refit down or --refit both: a sweep is made of refits")
        if folds < 2:
            raise ValueError(f"folds {folds}: a strength chosen on unseen windows needs at least 2")
        self.parts, self.sweep, self.weighting, self.folds = parts, sweep, weighting, folds
        self._guess = 0.1

    def resolved(self, method: str, family: Family) -> Refit:
        """What `auto` means for a method and a family; sweeps alone ask for refits."""
        parts = self.parts
        if parts == "auto":
            parts = "down" if (method == "come" or self.sweep) and family.linear_outputs else "none"
        if parts != "none":
            check_family(family)
        return Refit(parts, self.sweep, self.weighting, self.folds)

    @property
    def on(self) -> bool:
        return self.parts in ("down", "both")

    @property
    def settings(self) -> dict[str, Any]:
        """For the run's identity and its `run.json`."""
        return {"parts": self.parts, "sweep": self.sweep, "weighting": self.weighting, "folds": self.folds}

    @property
    def needs(self) -> frozenset[str]:
        """What the calibration pass keeps for it."""
        return frozenset({"streams"} if self.on else ())

    def after(self, module: PruningModule, step: Step, record: Record, last: bool) -> None:
        """Refit what a step (already done to the student and in the record) left behind; adds to its weights.

        Args:
            last: the target depth is reached, so that sweeps follow.
        """
        if not self.on:
            return
        index = max(step.layers[0] - (step.kind == "drop"), 0)
        errors: list[float | None] = [None] * len(module.student)
        weights = dict(step.weights or {})
        self._layer(module, record, index, weights, errors)
        module.changed_from(min(index, module.valid))
        if last:
            lowest = next(i for i, group in enumerate(record.groups) if len(group) > 1)
            for _ in range(self.sweep):
                for layer in range(lowest, len(module.student)):
                    self._layer(module, record, layer, weights, errors)
                    module.advance(layer)
                module.changed_from(lowest)
        step.weights = weights or None
        step.scores["refit_error"] = errors

    def _layer(
        self, module: PruningModule, record: Record, index: int, weights: dict[str, Tensor], errors: list[float | None]
    ) -> None:
        family = module.student.family
        paths = {"down": (family.mlp_output,), "both": (family.attention_output, family.mlp_output)}[self.parts]
        for path in paths:
            fit = self.fit(module, index, path, record.groups[index][-1] + 1)
            if fit is None:
                continue
            projection = module.student.part(module.student.layers[index], path)
            new = {f"{index}.{path}.{name}": value for name, value in fit.added_to(projection).items()}
            set_weights(module.student, new)
            weights.update(new)
            errors[index] = fit.error

    def fit(self, module: PruningModule, index: int, path: str, end: int) -> Fit | None:
        """The fit of one projection of student layer `index` towards the teacher's stream at boundary `end`."""
        fit = self.equations(module, index, path, end).solve(self._guess)
        if fit is not None:
            self._guess = fit.strength
        return fit

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
    ) -> NormalEquations:
        """Sums, over all processes, of the regression of what a layer lacks on the input of its projection `path`.

        Args:
            first: boundary of the student's stream that the layer gets.
            end: boundary of the teacher's stream that it must give (times what drops above it scaled the stream by).
            layer: by default student layer `first`.
            place: the layer index that it runs as; by default `first`.
            windows: only the first so many of all processes, rounded up to whole batches.
        """
        student, place = module.student, first if place is None else place
        projection = student.part(layer or student.layers[place], path)
        outputs, features = projection.weight.shape
        equations = NormalEquations(features, outputs, self.folds, projection.bias is not None, module.device)
        scale = module.record.scale_at(end)
        for number in module.first_batches(windows):
            batch = module.batches[number]
            hidden, target = module.stream(number, first), module.teacher_stream(number, end) * scale
            out, x = layer_run(student, place, path, batch["input_ids"], batch["attention"], hidden, layer)
            weight = token_weights(target, batch["mask"], self.weighting)
            residual = target.float() - out.float()
            folds = f"folds of {self.folds}"
            if folds not in batch:  # asked once: `tolist()` waits for the device
                # by content: which process a window is on, or its place in a batch, must not matter
                batch[folds] = (batch["input_ids"].sum(1) % self.folds).tolist()
            for window, fold in enumerate(batch[folds]):
                equations.add(x[window], residual[window], weight[window], fold)
        for values in equations.sums:
            values.copy_(module.sum(values))
        return equations
