"""What CoMe's distillation is compared with, and our own best."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from come_pl.distillation.layerwise import CoMeSP, share_of_labels
from come_pl.distillation.losses import language_modelling, logit_divergence
from come_pl.distillation.module import OTHERS, REST, DistillationModule, Trainable
from come_pl.distillation.rates import Rates, cosine


class _WholeStudent(DistillationModule):
    """One loss at the student's end."""

    objective: Literal["kd", "lm"] = "kd"
    temperature, label_weight = 1.0, 0.0

    def reach(self) -> tuple[int | None, int | None]:
        return (0 if self.objective == "lm" else None), None

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        _, final = self.student_states(batch, ())
        if self.objective == "lm":
            return {"lm": language_modelling(self.student, final, batch["input_ids"], batch["mask"])}
        _, teacher_final = self.teacher_states(batch, (), None)
        mask, tokens = batch["mask"], batch["input_ids"]
        kl = logit_divergence(
            self.student, final, self.teacher, teacher_final, mask, self.temperature, tokens, self.label_weight
        )
        return {"logits": kl}


class KD(_WholeStudent):
    """Plain logit distillation: T² · KL(teacher || student) of the next-token distributions (Hinton et al. 2015).

    Args:
        lr: Peak learning rate; a list or mapping gives one for each merged layer.
        temperature: Temperature of both distributions.
        label_weight: Share of the cross entropy with the text's own next token in the loss ("hard targets").
        trainable: Parameters that learn: merged layers, all decoder layers, or all (embeddings too).
        activation_checkpointing: Keep one stream a layer for the backward, and compute the rest again.
        **kwargs: See DistillationModule.
    """

    def __init__(
        self,
        lr: Rates = 2e-4,
        temperature: float = 1.0,
        label_weight: float = 0.0,
        trainable: Trainable = "all",
        activation_checkpointing: bool = False,
        **kwargs: Any,
    ):
        super().__init__(lr=lr, trainable=trainable, **kwargs)
        self.temperature, self.activation_checkpointing = temperature, activation_checkpointing
        self.label_weight = share_of_labels(label_weight)


class LM(_WholeStudent):
    """Plain language modelling: cross entropy with the next token of the text. The teacher is not run.

    Args:
        lr: Peak learning rate; a list or mapping gives one for each merged layer.
        trainable: Parameters that learn: merged layers, all decoder layers, or all (embeddings too).
        activation_checkpointing: Keep one stream a layer for the backward, and compute the rest again.
        **kwargs: See DistillationModule.
    """

    objective = "lm"

    def __init__(
        self,
        lr: Rates = 2e-4,
        trainable: Trainable = "all",
        activation_checkpointing: bool = False,
        **kwargs: Any,
    ):
        super().__init__(lr=lr, trainable=trainable, **kwargs)
        self.activation_checkpointing = activation_checkpointing


class LoRA(_WholeStudent):
    """Low-rank adapters (peft) on every projection of every layer, merged into the weights at the end.

    Args:
        lr: Peak learning rate.
        r: Rank of the adapters.
        alpha: Their scale is alpha / r.
        objective: lm (the usual recovery of pruned models) or kd.
        activation_checkpointing: Keep one stream a layer for the backward, and compute the rest again.
        **kwargs: See DistillationModule; `trainable` has no meaning here.
    """

    def __init__(
        self,
        lr: Rates = 1e-3,
        r: int = 16,
        alpha: int = 32,
        objective: Literal["lm", "kd"] = "lm",
        activation_checkpointing: bool = False,
        **kwargs: Any,
    ):
        super().__init__(lr=lr, **kwargs)
        if r < 1:
            raise ValueError(f"r {r}: expected a rank of at least 1")
        self.r, self.alpha, self.objective = r, alpha, objective
        self.activation_checkpointing = activation_checkpointing

    def prepare(self) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("--distill lora needs peft: pip install 'come_pl[lora]'") from None
        family = self.student.family
        paths = [family.query, family.key, family.value, family.attention_output, *family.mlp_inputs, family.mlp_output]
        names = {id(module): name for name, module in self.student_model.named_modules()}
        # in full: a model that also sees has projections of the same names elsewhere
        targets = [names[id(self.student.part(layer, path))] for layer in self.student.layers for path in paths]
        config = LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules=targets, lora_dropout=0.0)
        inject_adapter_in_model(config, self.student_model)
        for name, parameter in self.student_model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()  # of merged layers: adapters only, the rest is frozen
        inside = {id(p) for group in groups for p in group["params"]}
        adapters = [p for n, p in self.student_model.named_parameters() if n in self.trained and id(p) not in inside]
        return groups + ([{"name": OTHERS, "params": adapters, "lr": self.others_rate()}] if adapters else [])

    def finish(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in self.student.layers:
            adapted = [(n, m) for n, m in layer.named_modules() if isinstance(m, BaseTunerLayer)]
            for name, module in adapted:
                module.merge()
                parent, _, child = name.rpartition(".")
                base: nn.Module = module.get_base_layer()
                setattr(layer.get_submodule(parent), child, base)


class Hybrid(CoMeSP):
    """Our own best: hidden states on the student's own stream, logit KL and the text's own next token.

    Args:
        lr: Peak learning rate of the merged layers.
        merged_first: Share of the steps in which only merged layers learn, before all do. None measured best.
        second_lr: Peak learning rate of everything else, which learns in the second part.
        loss: What is compared at the end of layers: mse, kl or cosine.
        match: Compare at the merged layers, or at all layers from the first merged one on.
        state_weight: Weight of the hidden states' losses (their sum).
        logit_weight: Weight of KL(teacher || student) of the next-token distributions.
        label_weight: Share in that of the cross entropy with the text's own next token.
        trainable: What learns in the second part: all decoder layers, or all (embeddings too).
        activation_checkpointing: Keep one stream a layer for the backward, and compute the rest again.
        **kwargs: See DistillationModule.
    """

    def __init__(
        self,
        lr: Rates = 3e-4,
        merged_first: float = 0.0,
        second_lr: float = 2e-4,
        loss: Literal["mse", "kl", "cosine"] = "mse",
        match: Literal["merged", "all"] = "merged",
        state_weight: float = 0.1,
        logit_weight: float = 1.0,
        label_weight: float = 0.5,
        trainable: Literal["layers", "all"] = "all",
        activation_checkpointing: bool = False,
        **kwargs: Any,
    ):
        super().__init__(
            lr=lr,
            loss=loss,
            match=match,
            state_weight=state_weight,
            logit_weight=logit_weight,
            label_weight=label_weight,
            trainable=trainable,
            activation_checkpointing=activation_checkpointing,
            **kwargs,
        )
        if not 0 <= merged_first < 1:
            raise ValueError(f"merged_first {merged_first}: expected a share of the steps below 1")
        if not second_lr > 0:
            raise ValueError(f"second_lr {second_lr}: expected a rate above 0")
        self.merged_first, self.second_lr = merged_first, second_lr

    def check_trainer(self, trainer: Any) -> None:
        super().check_trainer(trainer)
        if self.merged_first and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"merged_first {self.merged_first}: DeepSpeed clips and averages the gradients of layers that do not "
                "learn yet with the others; leave it out, or take another strategy"
            )

    def others_rate(self) -> float:
        return self.second_lr

    def share_of_peak(self, name: str) -> Callable[[int], float]:
        """First part: warm-up and the cosine's top. Second part: a warm-up of its own for what joins, one cosine."""
        total, first = self.total_steps, round(self.merged_first * self.total_steps)
        warmup = self.warmup_steps(total)
        if name in (OTHERS, REST) and first:
            rise = max(1, warmup)
            return lambda s: 0.0 if s < first else min(1.0, (s - first + 1) / rise) * cosine(s, total, 0, self.floor)
        return lambda s: cosine(s, total, warmup, self.floor)

    def waiting(self) -> Collection[str]:
        return (OTHERS, REST) if self.global_step < round(self.merged_first * self.total_steps) else ()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """On one device what does not learn yet costs no gradient; sharded gradients are laid out once, before."""
        if self.trainer.world_size == 1 and "DeepSpeed" not in type(self.trainer.strategy).__name__:
            for group in self.trainer.optimizers[0].param_groups:
                if group.get("name") in (OTHERS, REST):
                    for parameter in group["params"]:
                        parameter.requires_grad_(group["name"] not in self.waiting())
