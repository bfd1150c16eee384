"""Losses between hidden states and between next-token distributions.

State losses compare the student's stream s_t with the teacher's h_t at one boundary, token by token, and are averaged
over real tokens. A few tokens of a stream (the first above all) carry activations a thousand times the others'
("massive activations"); a plain mean of squares would be about them alone. So every loss is dimensionless for each
token, which also makes losses of different depths comparable:

* `mse`:    ‖s_t − h_t‖² / ‖h_t‖²: the squared error in units of the token's own energy, which is a mean square error
            with each token weighted by 1 / mean(h_t²);
* `kl`:     T² · KL(softmax(h_t / (ρ_t T)) ‖ softmax(s_t / (ρ_t T))) over the hidden dimension, ρ_t the root mean square
            of h_t, T the temperature;
* `cosine`: 1 − cos(s_t, h_t).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from come_pl.decoder import Decoder

StateLoss = Literal["mse", "kl", "cosine"]
CHUNK_BYTES = 64 * 2**20  # of fp32 logits held at once


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (batch, seq) where `mask` (batch, seq) is True; 0 where nothing is."""
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def state_loss(student: Tensor, teacher: Tensor, mask: Tensor, kind: StateLoss = "mse", temperature: float = 1.0):
    """Scalar loss of the student's states (batch, seq, hidden) against the teacher's, over tokens of `mask`."""
    student, teacher = student.float(), teacher.detach().float()
    energy = teacher.square().mean(-1).clamp(min=1e-12)  # (batch, seq)
    if kind == "mse":
        each = (student - teacher).square().mean(-1) / energy
    elif kind == "kl":
        scale = temperature * energy.sqrt().unsqueeze(-1)
        log_student, log_teacher = (student / scale).log_softmax(-1), (teacher / scale).log_softmax(-1)
        each = temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    elif kind == "cosine":
        each = 1 - F.cosine_similarity(student, teacher, dim=-1)
    else:
        raise ValueError(f"loss {kind!r} is not known; expected mse, kl or cosine")
    return masked_mean(each, mask)


def chunk_length(batch: int, vocabulary: int) -> int:
    """Positions of a sequence whose logits are held at once."""
    return max(1, CHUNK_BYTES // (4 * vocabulary * batch))


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextlib.contextmanager
def _gathered(weight: Any) -> Iterator[None]:
    """ZeRO-3 keeps parameters in parts: inside, the weight is whole.

    Within the engine's forward it is so already: DeepSpeed gathers a weight that is read outside its own module, takes
    it for one of the running module from then on (in the backward too), and raises where anyone else frees it.
    """
    if hasattr(weight, "ds_id") and weight.ds_status.name != "AVAILABLE":
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield
    else:
        yield


class _Head:
    """The output projection of a model as a function of (weight, bias), cast once a batch instead of once a chunk.

    It is computed in the autocast dtype, but in fp32 for float16: gradients are taken here before a loss scaler has
    multiplied anything, and those of a mean over tokens are too small for float16.
    """

    def __init__(self, decoder: Decoder):
        module = decoder.model.get_output_embeddings()
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self.cap = getattr(decoder.config, "final_logit_softcapping", None)

    def cast(self) -> tuple[Tensor, Tensor | None]:
        dtype = _autocast_dtype(self.weight.device) or self.weight.dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        return self.weight.detach().to(dtype), None if self.bias is None else self.bias.detach().to(dtype)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # contiguous: a linear layer is many times slower on a slice of the sequence (bf16, CPU)
        logits = F.linear(hidden.to(weight.dtype).contiguous(), weight, bias).float()
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class _ChunkedLoss(torch.autograd.Function):
    """Σ over positions of a loss of the logits, chunk after chunk of the sequence.

    Gradients are taken chunk by chunk in the forward, while a chunk's logits are there, so the vocabulary is in memory
    for one chunk at a time in forward and backward, and no logit is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head, per_chunk: Any) -> Tensor:
        needs = ctx.needs_input_grad
        total = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
        with _gathered(head.weight):
            w, b = head.cast()
            of_weight = torch.zeros_like(w, dtype=torch.float32) if needs[1] else None
            of_bias = torch.zeros_like(b, dtype=torch.float32) if b is not None and needs[2] else None
            if needs[1]:
                w.requires_grad_(True)
            if of_bias is not None and b is not None:
                b.requires_grad_(True)
            size = chunk_length(hidden.shape[0], w.shape[0])
            for begin in range(0, hidden.shape[1], size):
                part = slice(begin, begin + size)
                chunk = hidden[:, part].detach()
                with torch.autocast(hidden.device.type, enabled=False):  # else it casts what a backward multiplies, too
                    if not any(needs[:3]):
                        total += per_chunk(head.logits(chunk, w, b), part)
                        continue
                    with torch.enable_grad():
                        chunk.requires_grad_(bool(needs[0]))
                        value = per_chunk(head.logits(chunk, w, b), part)
                    wanted = [t for t in (chunk, w, b) if t is not None and t.requires_grad]
                    found = dict(zip(map(id, wanted), torch.autograd.grad(value, wanted)))
                if gradient is not None:
                    gradient[:, part] = found[id(chunk)]
                if of_weight is not None:
                    of_weight += found[id(w)]
                if of_bias is not None:
                    of_bias += found[id(b)]
                total += value.detach()
        ctx.found = gradient, of_weight, of_bias
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # in place: that of a head is as large as the head; nobody else has them, and there is no second backward
        found, ctx.found = ctx.found, None
        return *(None if g is None else g.mul_(outer.to(g.dtype)) for g in found), None, None


def _over_chunks(student: Decoder, hidden: Tensor, per_chunk: Any) -> Tensor:
    head = _Head(student)
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # a Function's forward is not told, and would take the head's gradient
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _ChunkedLoss.apply(hidden, weight, bias, head, per_chunk)


def _labels(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each position (batch, seq) the token that follows, and its share in a mean over real tokens predicted from
    real tokens (0 at the last position)."""
    weight = F.pad((mask[:, 1:] & mask[:, :-1]).float(), (0, 1))
    return F.pad(input_ids[:, 1:], (0, 1)), weight / weight.sum().clamp(min=1)


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def logit_divergence(
    student: Decoder,
    hidden: Tensor,
    teacher: Decoder,
    teacher_hidden: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    input_ids: Tensor | None = None,
    label_weight: float = 0.0,
) -> Tensor:
    """T² · KL(teacher ‖ student) of next-token distributions, nats, mean over tokens of `mask` (batch, seq).

    With a label weight w (Hinton et al. 2015, "hard targets"): (1 − w) · that + w · cross entropy with the text's next
    token.

    Args:
        hidden: final hidden states (batch, seq, hidden) of the student, after its final norm.
        teacher_hidden: those of the teacher.
        input_ids: the text's tokens (batch, seq); needed with a label weight.
    """
    share = (1 - label_weight) * mask.float()
    share = share / mask.sum().clamp(min=1)
    labels, label_share = _labels(input_ids, mask) if input_ids is not None else (None, None)
    other = _Head(teacher)
    w, b = other.cast()

    def per_chunk(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            log_teacher = (other.logits(teacher_hidden[:, part], w, b) / temperature).log_softmax(-1)
            probabilities = log_teacher.exp()
            entropy = (probabilities * log_teacher).sum(-1)
        cross = (probabilities * (logits / temperature).log_softmax(-1)).sum(-1)
        loss = temperature**2 * ((entropy - cross) * share[:, part]).sum()
        if label_weight and labels is not None and label_share is not None:
            loss = loss + label_weight * (_nats(logits, labels[:, part]) * label_share[:, part]).sum()
        return loss

    return _over_chunks(student, hidden, per_chunk)


def language_modelling(student: Decoder, hidden: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) of the next token, over real tokens predicted from real tokens."""
    labels, share = _labels(input_ids, mask)

    def per_chunk(logits: Tensor, part: slice) -> Tensor:
        return (_nats(logits, labels[:, part]) * share[:, part]).sum()

    return _over_chunks(student, hidden, per_chunk)
