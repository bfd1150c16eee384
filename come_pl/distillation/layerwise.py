"""CoMe's own distillation: hidden states of merged layers against those of the layers that they stand for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn

from come_pl.data import ResumableSampler
from come_pl.decoder import attention_mask
from come_pl.distillation.losses import StateLoss, logit_divergence, state_loss
from come_pl.distillation.module import DistillationModule
from come_pl.distillation.rates import Rates, cosine
from come_pl.taps import streams


class CoMeMP(DistillationModule):
    """CoMe-mp: each merged layer is trained by itself (arXiv 2510.15304, step 3; the code was never released).

    A merged layer that stands for teacher layers a..b gets the teacher's stream before layer a and is trained to give
    the teacher's stream after layer b. One teacher forward, stopped at the last b, serves all merged layers; no layer's
    loss reaches another's weights, no logits are computed, and on the teacher's stream the student never runs whole.

    Differs from the paper's set-up in that one process trains all merged layers from one teacher forward, where the
    paper starts a process a layer.

    Args:
        lr: Peak learning rate: a number for all, a list from shallow to deep (interpolated geometrically over depth
            rank), a mapping from student layer to rate, or the published lists llama2-7b, qwen3-4b.
        loss: What is compared: mse, kl (over the hidden dimension) or cosine; each in units of the token itself.
        temperature: Temperature of the kl.
        inputs: What a merged layer reads: the teacher's stream (teacher, as in the paper) or the student's own
            (student). auto: the student's own if it was repaired or trained before, as its layers answer each other's
            errors then, which training on the teacher's stream undoes; the teacher's otherwise.
        schedule: All layers at once (joint), or one after another (sequential): memory of one layer's gradients and
            optimizer state; max_epochs and max_steps then count for each layer.
        **kwargs: See DistillationModule.
    """

    clips_each_layer = True

    def __init__(
        self,
        lr: Rates = 3e-4,
        loss: StateLoss = "mse",
        temperature: float = 1.0,
        inputs: Literal["auto", "teacher", "student"] = "auto",
        schedule: Literal["joint", "sequential"] = "joint",
        **kwargs: Any,
    ):
        super().__init__(lr=lr, **kwargs)
        if self.trainable != "merged":
            raise ValueError("--distill mp trains merged layers only; for more give --distill sp or hybrid")
        self.loss, self.temperature, self.inputs, self.schedule = loss, temperature, inputs, schedule
        self.phase = 0

    def reach(self) -> tuple[int | None, int | None]:
        return max(self.groups[i][-1] for i in self.merged) + 1, max(self.merged) + 1

    @property
    def phases(self) -> int:
        """How many times the data are gone through for one pass of each layer."""
        return len(self.merged) if self.schedule == "sequential" else 1

    def active(self) -> list[int]:
        """Merged layers that are being trained now."""
        return self.merged if self.schedule == "joint" else [self.merged[self.phase]]

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = self.active() if self.training_now else self.merged
        starts, ends = {i: self.groups[i][0] for i in layers}, {i: self.groups[i][-1] + 1 for i in layers}
        wanted = {*ends.values(), *(() if self.reads_own else starts.values())}
        states, _ = self.teacher_states(batch, wanted, stop=max(wanted))
        outputs = self._own_stream(batch, layers) if self.reads_own else self._local(batch, states, starts)
        return {
            self.name_of(i): state_loss(outputs[i], states[ends[i]], batch["mask"], self.loss, self.temperature)
            for i in layers
        }

    @property
    def reads_own(self) -> bool:
        """Whether a merged layer reads the student's own stream."""
        return self.adapted if self.inputs == "auto" else self.inputs == "student"

    @property
    def training_now(self) -> bool:
        return torch.is_grad_enabled()

    def _local(self, batch: dict[str, Any], states: dict[int, Tensor], starts: dict[int, int]) -> dict[int, Tensor]:
        """Output of each merged layer alone, on the teacher's stream."""
        outputs = {}
        attention = attention_mask(batch["mask"])
        for index, start in starts.items():
            hidden = states[start].to(self._stream_dtype(index)) if index > 0 else None
            with streams(self.student, [index + 1]) as found:
                self.student.run(batch["input_ids"], attention, start=index, hidden=hidden, stop=index + 1)
            outputs[index] = found[index + 1]
        return outputs

    def _stream_dtype(self, index: int) -> torch.dtype:
        """What the stream is in: that of the layer's norms (DeepSpeed's bf16 casts the weights themselves)."""
        path = self.student.family.attention_norm or self.student.family.query
        return self.student.part(self.student.layers[index], path).weight.dtype

    def _own_stream(self, batch: dict[str, Any], layers: list[int]) -> dict[int, Tensor]:
        """Outputs of the merged layers in one run of the student, its stream cut before each layer: those that are
        not trained keep nothing for a backward."""
        with self._cut(), streams(self.student, [i + 1 for i in layers]) as found:
            self.student.run(batch["input_ids"], attention_mask(batch["mask"]), stop=max(layers) + 1)
        return {i: found[i + 1] for i in layers}

    @contextlib.contextmanager
    def _cut(self) -> Iterator[None]:
        def detach(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (args[0].detach(), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}

        handles = [
            layer.register_forward_pre_hook(detach, with_kwargs=True, prepend=True) for layer in self.student.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- one layer after another ------------------------------------------------------------------------------------

    def share_of_peak(self, name: str) -> Callable[[int], float]:
        if self.schedule == "joint":
            return super().share_of_peak(name)
        each = self._steps_each()
        begin = [self.name_of(i) for i in self.merged].index(name) * each
        warmup = self.warmup_steps(each)
        return lambda step: cosine(step - begin, each, warmup, self.floor) if begin <= step < begin + each else 0.0

    def _steps_each(self) -> int:
        return max(1, self.total_steps // len(self.merged))

    def check_trainer(self, trainer: Any) -> None:
        super().check_trainer(trainer)
        if trainer.gradient_clip_val and isinstance(trainer.strategy, DeepSpeedStrategy):
            warnings.warn(
                "DeepSpeed clips the gradients of all layers together, not of each by itself; --trainer.strategy ddp "
                "clips each",
                stacklevel=2,
            )
        if self.schedule == "joint":
            return
        if trainer.world_size > 1 or isinstance(trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError("schedule sequential runs on one device, without sharding; give --model.schedule joint")
        if any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks):
            raise ValueError("patience would stop before all layers had their turn; give --model.schedule joint")

    def on_train_start(self) -> None:
        super().on_train_start()
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if self.schedule == "sequential" and isinstance(sampler, ResumableSampler) and self.trainer.max_epochs != -1:
            # every layer reads the same windows in the same order
            sampler.period = max(1, (self.trainer.max_epochs or 1) // len(self.merged))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.schedule == "sequential":
            self._enter(min(self.global_step // self._steps_each(), len(self.merged) - 1))

    def _enter(self, phase: int) -> None:
        """Only the layer of this phase has gradients and optimizer state."""
        self.phase = phase
        for rank, index in enumerate(self.merged):
            parameters = list(self.student.layers[index].parameters())
            for parameter in parameters:
                parameter.requires_grad_(rank == phase)
                if rank != phase:
                    parameter.grad = None
                    for optimizer in self.trainer.optimizers:
                        optimizer.state.pop(parameter, None)


def share_of_labels(weight: float) -> float:
    """A label weight that can be one."""
    if not 0 <= weight <= 1:
        raise ValueError(f"label_weight {weight}: expected a share from 0 to 1")
    return weight


class CoMeSP(DistillationModule):
    """CoMe-sp: one process; the student runs as a whole and the losses of all merged layers, on its own stream, are
    summed and reach everything below them.

    Args:
        lr: Peak learning rate; published: 1e-5 for all, of 7B models. Small models and short runs want 1e-4.
        loss: What is compared at the end of each merged layer: mse, kl (over the hidden dimension) or cosine.
        temperature: Temperature of the kl.
        match: Compare at the merged layers, or at all layers from the first merged one on.
        state_weight: Weight of the hidden states' losses (their sum).
        logit_weight: Weight of KL(teacher || student) of the next-token distributions; 0: no logits are computed.
        label_weight: Share in that of the cross entropy with the text's own next token.
        activation_checkpointing: Keep one stream a layer for the backward, and compute the rest again.
        **kwargs: See DistillationModule.
    """

    def __init__(
        self,
        lr: Rates = 1e-5,
        loss: StateLoss = "mse",
        temperature: float = 1.0,
        match: Literal["merged", "all"] = "merged",
        state_weight: float = 1.0,
        logit_weight: float = 0.0,
        label_weight: float = 0.0,
        activation_checkpointing: bool = False,
        **kwargs: Any,
    ):
        super().__init__(lr=lr, **kwargs)
        self.loss, self.temperature, self.match = loss, temperature, match
        self.state_weight, self.logit_weight = state_weight, logit_weight
        self.label_weight = share_of_labels(label_weight)
        if label_weight and not logit_weight:
            raise ValueError(f"label_weight {label_weight} is a share of logit_weight, which is 0; give both")
        self.activation_checkpointing = activation_checkpointing

    def reach(self) -> tuple[int | None, int | None]:
        if self.logit_weight:
            return None, None
        if not (last := self.compared()):
            raise ValueError("state_weight and logit_weight are both 0: nothing would be trained")
        return self.groups[last[-1]][-1] + 1, last[-1] + 1

    def check_trainer(self, trainer: Any) -> None:
        super().check_trainer(trainer)
        if self.trainable == "all" and not self.logit_weight and trainer.world_size > 1:
            raise ValueError(
                "trainable all without logits leaves the final norm without gradient, which several devices do not "
                "allow: give --model.logit_weight 1 or --model.trainable layers"
            )

    def compared(self) -> list[int]:
        """Student layers after which the streams are compared."""
        if self.state_weight == 0:
            return []
        return self.merged if self.match == "merged" else list(range(self.merged[0], len(self.groups)))

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = self.compared()
        ends = {i: self.groups[i][-1] + 1 for i in layers}
        stop = None if self.logit_weight else max(ends.values())
        theirs, teacher_final = self.teacher_states(batch, set(ends.values()), stop)
        ours, final = self.student_states(batch, [i + 1 for i in layers])
        mask = batch["mask"]
        found = {
            self.name_of(i): self.state_weight
            * state_loss(ours[i + 1], theirs[ends[i]], mask, self.loss, self.temperature)
            for i in layers
        }
        if self.logit_weight:
            tokens, weight = batch["input_ids"], self.label_weight
            kl = logit_divergence(
                self.student, final, self.teacher, teacher_final, mask, input_ids=tokens, label_weight=weight
            )
            found["logits"] = self.logit_weight * kl
        return found
