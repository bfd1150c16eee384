"""MKA: merge the last two layers, by how much each has in common with all others ("Pruning via Merging", EMNLP 2024).

    X_l    = output of layer l, mean over the counted tokens of each window                       (windows, hidden)
    K      = exp(−(‖x − y‖ / σ)^½),  K ← K / (p pᵀ)^α,  D^−½ K D^−½ = U Λ Uᵀ,  Φ_l = U_{2,3} / U_1   (diffusion map)
    S_ij   = mean over the 2 dimensions of I(rank Φ_i, rank Φ_j) / √(H(rank Φ_i) H(rank Φ_j))   (kNN estimates)
    λ      = sigmoid(β r),  r = S̄_i / (S̄_i + S̄_j),  S̄ the row means of S
    W      = λ W_i + (1 − λ) W_j of the last two layers i, j; norms of layer i

S is measured on the dense model, once; the merged layer keeps the place of i. Defaults of the paper: σ = 8, α = ½,
β = 1, 5 neighbours for I and 50 for H; `num_tasks` (the CoMe toolkit's flag) gives windows / num_tasks and num_tasks.
H of ranks is the same for every layer and cancels in r, so only the neighbours of I change λ (≈ 0.62).

Differs from the released code in: merged weights are really written (there they go into a dictionary that is thrown
away, so that the last layers are dropped); samples are whole windows (there, the first chunk of token distances);
calibration is the run's text (there, the questions of the benchmark that is reported); entropy is that of ranks 1 … N.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from come_pl.pruning.batches import inputs_of
from come_pl.pruning.methods.base import Decision, Method
from come_pl.pruning.methods.common import check
from come_pl.pruning.methods.drops import rounded
from come_pl.record import Record, Step
from come_pl.taps import boundaries

if TYPE_CHECKING:
    from come_pl.pruning.module import PruningModule


def diffusion_map(x: Tensor, sigma: float = 8.0, alpha: float = 0.5, dimensions: int = 2) -> Tensor:
    """Coordinates (samples, dimensions) of `x` (samples, features) on its manifold, fp64; signs are arbitrary."""
    x = x.double()
    kernel = torch.exp(-((torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / sigma) ** 0.5))
    density = kernel.sum(1)
    kernel = kernel / torch.outer(density, density) ** alpha
    degree = kernel.sum(1).sqrt()
    vectors = torch.linalg.eigh(kernel / torch.outer(degree, degree)).eigenvectors.flip(1)  # largest first
    return vectors[:, 1 : dimensions + 1] / vectors[:, :1]


def ranks(x: Tensor) -> Tensor:
    """Rank 1 … samples of each column of (samples, dimensions)."""
    return x.argsort(dim=0, stable=True).argsort(dim=0).double() + 1


def mutual_information(x: Tensor, y: Tensor, neighbours: int) -> float:
    """kNN estimate (Kraskov et al., first algorithm) in nats, at least 0, of two variables (samples,)."""
    dx, dy = (x[:, None] - x).abs(), (y[:, None] - y).abs()
    radius = torch.maximum(dx, dy).kthvalue(neighbours + 1).values[:, None]  # the nearest is the sample itself
    inside = [(d < radius).sum(1).clamp(min=1).double() for d in (dx, dy)]
    n, k = torch.tensor([len(x), neighbours], dtype=torch.float64).digamma().tolist()
    return max(n + k - float(sum(count.digamma() for count in inside).mean()), 0.0)  # type: ignore[union-attr]


def entropy(x: Tensor, neighbours: int) -> float:
    """kNN estimate (Kozachenko and Leonenko) in nats of a variable (samples,)."""
    radius = (x[:, None] - x).abs().kthvalue(neighbours + 1).values
    n, k = torch.tensor([len(x), neighbours], dtype=torch.float64).digamma().tolist()
    return n - k + float((2 * radius.clamp(min=1e-12)).log().mean())


def npib(x: Tensor, y: Tensor, neighbours: int, entropy_neighbours: int) -> float:
    """Normalised pairwise information of two layers' ranks (samples, dimensions): mean over dimensions."""
    values = []
    for a, b in zip(x.T, y.T, strict=True):
        size = math.sqrt(max(entropy(a, entropy_neighbours) * entropy(b, entropy_neighbours), 1e-12))
        values.append(mutual_information(a, b, neighbours) / size)
    return sum(values) / len(values)


class MKA(Method):
    """MKA: the last two layers are averaged again and again, the earlier one with weight lambda.

    Args:
        lambda_override: Weight of the earlier layer in every merge, in [0, 1], instead of the measured one.
        num_tasks: Tasks that the windows come from: information is estimated from windows / num_tasks neighbours,
            entropy from num_tasks; without it from 5 and 50.
        beta: Slope of the sigmoid that makes lambda.
        sigma: Scale of the distance between windows.
        alpha: Exponent on the density of windows that is divided out.
    """

    progressive = True

    def __init__(
        self,
        lambda_override: float | None = None,
        num_tasks: int | None = None,
        beta: float = 1.0,
        sigma: float = 8.0,
        alpha: float = 0.5,
    ):
        if lambda_override is not None and not 0 <= lambda_override <= 1:
            raise ValueError(f"lambda_override {lambda_override}: a weight lies in [0, 1]")
        if not sigma > 0:
            raise ValueError(f"sigma {sigma}: a scale is positive")
        check(num_tasks=(num_tasks, 1), beta=(beta, 0), alpha=(alpha, 0))
        self.lambda_override, self.num_tasks = lambda_override, num_tasks
        self.beta, self.sigma, self.alpha = beta, sigma, alpha

    def __call__(
        self, module: PruningModule, statistics: dict[str, Tensor], record: Record, *, remove: int
    ) -> Decision:
        i, j = record.layers - 2, record.layers - 1
        if self.lambda_override is not None:
            weight, scores = self.lambda_override, {}
        else:
            shared = record.steps[0].scores["shared_information"] if record.steps else self.shared_information(module)
            first, second = float(shared[i] or 0), float(shared[j] or 0)
            r = first / (first + second) if first + second > 0 else 0.5
            weight, scores = 1 / (1 + math.exp(-self.beta * r)), {"shared_information": list(shared[: record.layers])}
        return Decision(Step("blend", [i, j], [weight, 1 - weight], norm="first", scores=scores))

    @torch.inference_mode()
    def shared_information(self, module: PruningModule) -> list[float]:
        """Row means of S, of each dense layer."""
        pooled = []
        for batch in module.batches:
            mask = batch["mask"]
            real = mask.any(1)
            weight = (mask / mask.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
            with boundaries(module.teacher) as found:
                module.teacher.run(*inputs_of(batch))
            outputs = (found[layer + 1].float() for layer in range(len(module.teacher)))
            pooled.append(torch.stack([(x.where(mask[..., None], 0) * weight).sum(1)[real].cpu() for x in outputs]))
        samples = torch.cat(_of_all_processes(torch.cat(pooled, 1)), 1)
        count = samples.shape[1]
        if count < 8:
            raise ValueError(f"mka compares layers over calibration windows, of which it needs at least 8, not {count}")
        near, far = (5, 50) if self.num_tasks is None else (count // self.num_tasks, self.num_tasks)
        near, far = (min(max(k, 1), count - 1) for k in (near, far))
        maps = [ranks(diffusion_map(x, self.sigma, self.alpha)) for x in samples]
        s = torch.zeros(len(maps), len(maps), dtype=torch.float64)
        for i, x in enumerate(maps):
            for j, y in enumerate(maps[: i + 1]):
                s[i, j] = s[j, i] = npib(x, y, near, far)
        return [rounded(value) for value in s.mean(1).tolist()]


def _of_all_processes(value: Tensor) -> list[Tensor]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Tensor] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
