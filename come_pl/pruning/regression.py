"""Ridge regression from sums: nothing but the normal equations is kept of the tokens, by fold for cross-validation.

    minimise over Δ   Σ_t w_t ‖r_t − Δ x_t‖² + λ s ‖Δ‖²,   s = mean diagonal of Σ_t w_t x_t x_tᵀ
    Δ = B (A + λ s I)⁻¹,   A = Σ w x xᵀ,   B = Σ w r xᵀ

Δ is the change of a projection, so the ridge pulls towards the weights that are there. λ is the one with the least
error on folds that the fit has not seen, of which two are asked; it is found by walking along a grid from where the
last fit ended.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from come_pl.offload import present

Weighting = Literal["inverse", "uniform"]
GRID = tuple(10 ** (k / 2) for k in range(-7, 5))  # 0.0003 … 100
COMPARED = 2  # folds that strengths are compared on; the error of the one that is taken is that of all
BLOCK = 256  # rows of a sum of outer products that are computed at once, from the diagonal to the right


@dataclass
class Fit:
    """A solved regression.

    Attributes:
        change: Δ (outputs, features), fp32.
        bias: change of the bias (outputs,), or None.
        strength: λ.
        error: error on unseen folds in units of the error without any change; below 1 is better.
    """

    change: Tensor
    bias: Tensor | None
    strength: float
    error: float

    def added_to(self, projection: nn.Linear) -> dict[str, Tensor]:
        """Weight, and bias where it was fitted, of a projection with the change, in their dtypes."""
        with present(projection):
            new = {"weight": (projection.weight.float() + self.change).to(projection.weight.dtype)}
        if self.bias is not None:
            new["bias"] = (projection.bias.float() + self.bias).to(projection.bias.dtype)
        return new

    def before(self, projection: nn.Linear) -> dict[str, Tensor]:
        """Weight of a projection that is to read x + Δ x, given x, in its dtype."""
        with present(projection):
            weight = projection.weight
            return {"weight": (weight.float() + weight.float() @ self.change).to(weight.dtype)}


class NormalEquations:
    """Sums over tokens of one regression, one set a fold: of each call in fp32, or as autocast has its products and
    rounds their sums, of the calls in fp64, so that it does not matter how windows are spread over batches or
    processes; solved in fp64, once the strength is found.

    Args:
        features: width of x.
        outputs: width of r.
        folds: at least 2.
        bias: also fit a constant.
        a: Σ w x xᵀ of all processes (folds, features, features), where x and w are those of another regression.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        folds: int,
        bias: bool,
        device: torch.device | None = None,
        a: Tensor | None = None,
    ):
        if folds < 2:
            raise ValueError(f"folds {folds}: cross-validation needs at least 2")
        width = features + bias
        self.bias, self.known = bias, a is not None
        self._a = torch.zeros(folds, width, width, dtype=torch.float64, device=device) if a is None else a
        self._half = False  # whether what is below the diagonal has not been filled in
        self.b = torch.zeros(folds, outputs, width, dtype=torch.float64, device=device)
        self.c = torch.zeros(folds, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, r: Tensor, weight: Tensor, fold: int) -> None:
        """x (tokens, features), r (tokens, outputs), weight (tokens,), 0 for a token that does not count."""
        root = weight.float().sqrt()[:, None]
        # not a product alone: what stands at a padding position may be NaN
        x = torch.where(root > 0, x.float() * root, 0.0)
        r = torch.where(root > 0, r.float() * root, 0.0)
        if self.bias:
            x = torch.cat([x, root], dim=1)
        if not self.known:
            add_outer(self._a[fold], x)
            self._half = True
        self.b[fold] += r.T @ x
        self.c[fold] += r.square().sum(dtype=torch.float64)
        self.tokens += (root > 0).sum()

    def add_windows(self, batch: dict[str, Any], x: Tensor, r: Tensor, weight: Tensor) -> None:
        """The windows of a batch: x, r (batch, seq, width), weight (batch, seq)."""
        for window, fold in enumerate(folds_of(batch, len(self.c))):
            self.add(x[window], r[window], weight[window], fold)

    @property
    def a(self) -> Tensor:
        """Σ w x xᵀ (folds, width, width)."""
        if self._half:
            mirror(self._a)
            self._half = False
        return self._a

    def summed(self, add_up: Callable[[Tensor], None]) -> NormalEquations:
        """With the sums of all processes; `add_up` makes one tensor that of all."""
        for values in self.sums:
            add_up(values)
        return self

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What processes have to add up."""
        return (*(() if self.known else (self.a,)), self.b, self.c, self.tokens)

    def _change(self, a: Tensor, b: Tensor, strength: float) -> Tensor | None:
        """Δ (outputs, width) in the dtype of the sums; None where the equations cannot be solved."""
        diagonal = a.diagonal()
        features = len(diagonal) - self.bias
        ridge = diagonal[:features].mean() * strength
        a = a.clone()
        a.diagonal()[:features] += ridge
        if self.bias:  # the constant itself is free
            a.diagonal()[features:] += diagonal[features:] * 1e-6
        factor, info = torch.linalg.cholesky_ex(a)
        if int(info):
            return None
        change = torch.cholesky_solve(b.T, factor).T
        return change if bool(change.isfinite().all()) else None

    def at(self, strength: float) -> Tensor | None:
        """Δ (outputs, features), fp32, of one λ, unseen windows or not; None where the equations cannot be solved."""
        change = self._change(self.a.sum(0), self.b.sum(0), strength)
        return None if change is None else rounded_change(change)[:, : change.shape[1] - self.bias].float()

    def _unseen_error(self, fold: int, a: Tensor, b: Tensor) -> Callable[[float], float]:
        """λ → the error in a fold of the fit to the others, of the sums of all. In fp32, which is enough to compare
        strengths and is faster."""
        own_a, own_b = self.a[fold].float(), self.b[fold].float()
        other_a, other_b = (a - self.a[fold]).float(), (b - self.b[fold]).float()

        def error(strength: float) -> float:
            change = self._change(other_a, other_b, strength)
            if change is None:
                return math.inf
            return float(self.c[fold] + ((change @ own_a - 2 * own_b) * change).sum(dtype=torch.float64))

        return error

    def solve(self, guess: float | None = None, grid: Sequence[float] = GRID) -> Fit | None:
        """The best fit; None where no strength does better on unseen folds than no change at all, and where sums are
        not finite: then nothing can be solved.

        Args:
            guess: strength to begin the search at, near the best one; by default 0.1, searched in wider strides first.
            grid: strengths, ascending.
        """
        folds = [f for f in range(len(self.c)) if float(self.c[f]) > 0]
        if len(folds) < 2:
            return None
        a, b, nothing = self.a.sum(0), self.b.sum(0), float(self.c.sum())
        begin = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / (guess or 0.1))))

        @functools.cache
        def unseen(fold: int) -> Callable[[float], float]:
            return self._unseen_error(fold, a, b)

        @functools.cache
        def error(index: int, fold: int) -> float:
            return unseen(fold)(grid[index])

        def best(folds: Sequence[int]) -> int:
            return walked(lambda index: sum(error(index, fold) for fold in folds), begin, len(grid), 1 if guess else 2)

        here = best(folds[:COMPARED])
        left = sum(error(here, fold) for fold in folds)
        if not left < nothing:  # close to nothing all folds have their say
            here = best(folds)
            left = sum(error(here, fold) for fold in folds)
        if not left < nothing:
            return None
        change = self._change(a, b, grid[here])
        if change is None:
            return None
        change, split = rounded_change(change), change.shape[1] - self.bias
        bias = change[:, split].float() if self.bias else None
        return Fit(change[:, :split].float(), bias, grid[here], float(f"{left / nothing:.6g}"))


def token_weights(target: Tensor, mask: Tensor, weighting: Weighting) -> Tensor:
    """(batch, seq): what each token counts for in a fit; 0 at padding."""
    if weighting == "uniform":
        return mask.float()
    size = target.float().square().mean(-1)
    return torch.where(mask, 1 / size.clamp(min=1e-12), 0.0)


def add_outer(total: Tensor, rows: Tensor) -> None:
    """Adds Σ x xᵀ of rows x (tokens, width), summed in their dtype or autocast's, to the upper half of `total` (width,
    width): what is below the diagonal is the same, and `mirror` fills it in at the end."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):  # once, not for each block
        rows = rows.to(torch.get_autocast_dtype(device))
    for begin in range(0, rows.shape[1], BLOCK):
        total[begin : begin + BLOCK, begin:] += rows[:, begin : begin + BLOCK].T @ rows[:, begin:]


def mirror(totals: Tensor) -> None:
    """Makes symmetric matrices (…, width, width) of their upper halves, in place: these can be as large as a layer."""
    for begin in range(0, totals.shape[-1], BLOCK):
        end = begin + BLOCK
        totals[..., end:, begin:end] = totals[..., begin:end, end:].mT
        square = totals[..., begin:end, begin:end]
        square.copy_(square.triu() + square.triu(1).mT)


def walked(error: Callable[[int], float], begin: int, count: int, stride: int = 1) -> int:
    """Of the indices 0 … count − 1 one whose error, asked for again and again, is no larger than its neighbours', found
    by walking downhill from `begin` in strides that are halved where neither side is better."""
    here = begin
    while stride:
        near = [i for i in (here - stride, here, here + stride) if 0 <= i < count]
        best = min(near, key=error)
        if best == here:
            stride //= 2
        here = best
    return here


def folds_of(batch: dict[str, Any], folds: int) -> list[int]:
    """Which fold each window of a batch is in. That goes by its content: which process it is on, or its place in a
    batch, must not matter."""
    name = f"folds of {folds}"
    if name not in batch:  # asked once: `tolist()` waits for the device
        batch[name] = (batch["input_ids"].sum(1) % folds).tolist()
    return batch[name]


def rounded_change(change: Tensor) -> Tensor:
    """To a millionth of the largest entry: the order in which processes' sums were added leaves no trace."""
    largest = float(change.abs().max())
    if largest == 0:
        return change
    unit = 2.0 ** (math.floor(math.log2(largest)) - 20)
    return (change / unit).round() * unit
