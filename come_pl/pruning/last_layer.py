"""The last layer's output projection, solved for what the head makes of it.

Least squares leads the last layer towards the dense model's final states, all of their directions alike; what counts is
what the head makes of them. With h the final state before the norm, x what the last layer's MLP output projection gets,
W the head and y what the dense model and the text say follows (`head.py`):

    min over D   Σ_t  lse(W u_t) − y_t · u_t,     u_t = norm(h_t + D x_t)

by steps of Newton's method with a curvature in factors (K-FAC, Martens and Grosse, ICML 2015),

    D ← D − G⁻¹ (Σ_t g_t x_tᵀ / T) A⁻¹,   A = Σ_t x̂_t x̂_tᵀ / T,   G = Σ_t ĝ_t ĝ_tᵀ / T

g the gradient at h + D x; ĝ the same with the next token instead of y, times |h|, x̂ = x / |h| (root mean squares): the
norm divides by |h|, so that massive activations would own A otherwise. G ⊗ A + λ Ḡ Ā I is what is inverted, Ḡ and Ā
mean diagonals, λ the one with the least loss on windows that the step has not seen; a step that is no better there is
not taken. No learning rate, no epochs.

It learns from the text as well as from the dense model, and on text of another kind gains less (README).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from come_pl.offload import present
from come_pl.pruning import final_norm, head
from come_pl.pruning.head import Positions
from come_pl.surgery import FINAL_NORM, set_weights
from come_pl.taps import layer_run

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule

POSITIONS = 8192  # predicted tokens of all processes that are looked at, evenly spread, and up to twice as many
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(9))  # 1 … 10,000
STEPS = 2  # a third brought little, and each reads the tokens again


def repaired_head(module: PruningModule, folds: int, layer: bool) -> dict[str, Tensor]:
    """What goes by predictions: the final norm's gains (`final_norm.py`), then, with `layer`, this. The student has the
    new weights, and they are returned by the names of `surgery.set_weights`."""
    new, student = {}, module.student
    gains = final_norm.gains(module, folds)
    if gains is not None:
        new[f"{FINAL_NORM}.weight"] = gains
        set_weights(student, new)
    weight = projection(module, folds) if layer else None
    if weight is not None:
        last = len(student) - 1
        own = {f"{last}.{student.family.mlp_output}.weight": weight}
        set_weights(student, own)
        module.changed_from(last)
        new |= own
    return new


def projection(module: PruningModule, folds: int, positions: int = POSITIONS) -> Tensor | None:
    """The new weight (hidden, features) of the last layer's MLP output projection, in its dtype; None where none is
    better on unseen windows.

    Args:
        folds: calibration windows are dealt into so many parts; the first is not fitted to.
        positions: at least so many predicted tokens are looked at, where there are as many, and fewer than twice that.
    """
    student = module.student
    if not head.predictable(module) or not student.family.linear_outputs:
        return None
    seen, unseen = _positions(module, folds, positions)
    if not len(seen) or not len(unseen):
        return None
    own = student.part(student.layers[-1], student.family.mlp_output)
    shape, features = (student.geometry.hidden, student.geometry.ffn), _features(seen)
    change = head.newton(
        torch.zeros(shape, device=module.device),
        lambda change: _loss(module, unseen, change),
        lambda change: _step(*_derivatives(module, seen, change), features),
        STRENGTHS,
        1000.0,
        STEPS,
    )
    if change is None:
        return None
    with present(own):
        return (own.weight.float() + change.to(own.weight.device)).to(own.weight.dtype)


def _positions(module: PruningModule, folds: int, positions: int) -> tuple[Positions, Positions]:
    """What is read of each token are h and x."""
    student, last = module.student, len(module.student) - 1

    def read(number: int) -> tuple[Tensor, Tensor]:
        batch = module.batches[number]
        inputs = batch["input_ids"], batch["attention"], module.stream(number, last)
        return layer_run(student, last, student.family.mlp_output, *inputs)

    return head.positions(module, folds, positions, read)


@torch.inference_mode()
def _loss(module: PruningModule, at: Positions, change: Tensor) -> float:
    """Nats a token, up to a constant."""
    h, x = at.read
    norm = module.student.final_norm
    return head.loss(module, at, lambda rows: _normed(norm, h[rows] + x[rows] @ change.T))


def _normed(norm: nn.Module, state: Tensor) -> Tensor:
    """In the dtype of the model, as it runs; returned in fp32."""
    dtype = next((p.dtype for p in norm.parameters()), state.dtype)
    return norm(state.to(dtype)).float()


def _sizes(at: Positions) -> Tensor:
    """|h| of each token (tokens, 1)."""
    return at.read[0].square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()


def _features(at: Positions) -> Tensor:
    """A (features, features), fp64."""
    x = at.read[1] / _sizes(at)
    return (x.T @ x).double() / len(at)


def _derivatives(module: PruningModule, at: Positions, change: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient (hidden, features), G (hidden, hidden)), means over the tokens, fp64."""
    (h, x), norm = at.read, module.student.final_norm
    weight = module.student.model.get_output_embeddings().weight
    slopes: list[Tensor] = []  # of the loss of each token
    own: list[Tensor] = []  # of the nats of its next token

    def states(rows: slice) -> Tensor:
        return h[rows] + x[rows] @ change.T

    for rows, _, logits in head.logits_of(module, at, lambda rows: _normed(norm, states(rows))):
        expected = head.expected(weight, logits)
        state = states(rows).requires_grad_()
        with torch.enable_grad():
            normed = _normed(norm, state)
        slopes += torch.autograd.grad(normed, state, expected - at.y[rows], retain_graph=True)
        own += torch.autograd.grad(normed, state, expected - weight[at.following[rows]].float())
    sized = torch.cat(own) * _sizes(at)
    return (torch.cat(slopes).T @ x).double() / len(at), (sized.T @ sized).double() / len(at)


def _step(gradient: Tensor, g: Tensor, a: Tensor) -> Callable[[float], Tensor]:
    """λ → (G ⊗ A + λ Ḡ Ā I)⁻¹ applied to the gradient; not finite where these are not."""
    if not all(bool(values.isfinite().all()) for values in (gradient, g, a)):
        return lambda strength: torch.full_like(gradient, math.inf)
    own_g, basis_g = torch.linalg.eigh(g)
    own_a, basis_a = torch.linalg.eigh(a)
    turned, curvature = basis_g.T @ gradient @ basis_a, own_g[:, None] * own_a
    mean = own_g.mean() * own_a.mean()
    return lambda strength: basis_g @ (turned / (curvature + strength * mean)) @ basis_a.T
