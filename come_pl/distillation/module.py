"""The LightningModule of distillation: what every method shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from come_pl.decoder import Decoder, attention_mask
from come_pl.distillation.rates import Rates, cosine, learning_rates
from come_pl.offload import move, put_tables, tables
from come_pl.taps import streams

Trainable = Literal["merged", "layers", "all"]
OTHERS = "others"  # the parameter group of layers that were not merged
REST = "embeddings and norm"


class Diverged(ValueError):
    """A loss or a gradient that is not finite, or a loss that exploded."""


class NothingToTrain(ValueError):
    """The student has no merged layer."""


class _Checkpointed(nn.Module):
    """Runs a layer again in the backward instead of keeping its activations."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


def _let_go(decoder: Decoder, stop: int | None) -> None:
    """Takes out of a model what a forward up to layer `stop` does not run; without any layer, the embeddings too."""
    if stop is None:
        return
    decoder.base.layers = decoder.layers[:stop]
    decoder.model.set_output_embeddings(nn.Identity())
    if stop == 0:
        decoder.model.set_input_embeddings(nn.Identity())


def _outside(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Parameters of a model that are in no decoder layer."""
    inside = {id(p) for p in decoder.layers.parameters()}
    return {name: p for name, p in decoder.model.named_parameters() if id(p) not in inside}


class DistillationModule(LightningModule):
    """Trains a pruned student towards its dense teacher. Subclasses say what is compared, in `losses`.

    The teacher is no part of the module tree: it is replicated, never trained, and in no checkpoint. What a method
    never runs is let go, and frozen layers of the student that equal the teacher's are the very same tensors: memory
    holds one model, and what learns.

    Args:
        lr: Peak learning rate: a number for all, a list from shallow to deep (interpolated geometrically over depth
            rank to the number of merged layers), a mapping from student layer to rate, or the published lists
            llama2-7b, qwen3-4b.
        weight_decay: Weight decay of AdamW.
        warmup: Share of the steps over which the rate rises to its peak.
        floor: Share of the peak rate at the end of the cosine.
        trainable: Parameters that learn: merged layers, all decoder layers, or all (embeddings too).
        explode: A loss above this many times its own running mean stops the run.
    """

    clips_each_layer = False  # clip by each layer's own gradient norm instead of the norm of all

    def __init__(
        self,
        lr: Rates = 1e-4,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
        floor: float = 0.0,
        trainable: Trainable = "merged",
        explode: float = 10.0,
    ):
        super().__init__()
        if not 0 <= warmup < 1 or not 0 <= floor <= 1:
            raise ValueError(f"warmup {warmup}, floor {floor}: expected shares of the steps and of the peak rate")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay {weight_decay}: expected at least 0")
        self.lr, self.weight_decay, self.warmup, self.floor = lr, weight_decay, warmup, floor
        self.trainable: Trainable = trainable
        self.explode = explode
        self.activation_checkpointing = False
        self.strict_loading = False  # a checkpoint holds what is trained, nothing else
        self.scales: Sequence[float] | None = None  # see `attach`
        self.adapted = False  # see `attach`
        self.latest: dict[str, float] = {}  # the last step's losses by name
        self._means: dict[str, float] = {}

    # -- models -----------------------------------------------------------------------------------------------------

    def attach(
        self,
        teacher: Any,
        student: Any,
        groups: Sequence[Sequence[int]],
        scales: Sequence[float] | None = None,
        adapted: bool = False,
    ) -> None:
        """Give the module its models, and for each student layer the teacher layers that it stands for.

        The models are the module's from here on: layers, embeddings and heads that are never run are taken out of them.

        Args:
            scales: for each boundary of the teacher, what the student's stream there was multiplied by, if any was.
            adapted: the student's layers were fitted to its own stream, by a repair or by training.

        Raises: as `correspond`.
        """
        self.correspond(groups)
        self.scales, self.adapted = scales, adapted
        self.teacher = Decoder(teacher.requires_grad_(False).eval())  # not an nn.Module: hidden from the module tree
        self.student_model = student.eval()  # dropout would be noise: a loss is compared with the teacher's states
        self.student, self._tables = Decoder(student), tables(student)
        teacher_stop, student_stop = self.reach()
        _let_go(self.teacher, teacher_stop)
        _let_go(self.student, student_stop)
        self.prepare()
        named = self.student_model.named_parameters(remove_duplicate=False)
        self.trained = frozenset(name for name, p in named if p.requires_grad)  # by name: sharding replaces parameters
        self.share()

    def correspond(self, groups: Sequence[Sequence[int]]) -> None:
        """Say which teacher layers each student layer stands for; needs no model.

        Raises:
            NothingToTrain: no student layer stands for more than one teacher layer.
            BadRate: learning rates that do not fit the merged layers.
        """
        self.groups = [list(group) for group in groups]
        self.merged = [i for i, group in enumerate(self.groups) if len(group) > 1]
        if not self.merged:
            raise NothingToTrain("no layer of the student stands for more than one teacher layer: nothing was merged")
        self.rates()

    def reach(self) -> tuple[int | None, int | None]:
        """How many layers of teacher and student are run, from the first on; None: all of them and the head."""
        return None, None

    def check_values(self) -> None:
        """Raises ValueError for values with which nothing would be learned, whatever the trainer."""
        for name in ("temperature", "alpha"):  # of the methods that have one
            if not (value := getattr(self, name, 1)) > 0:
                raise ValueError(f"{name} {value}: expected a number above 0")

    def check_trainer(self, trainer: Any) -> None:
        """Raises ValueError for settings that this method cannot run under; no model is needed."""
        self.check_values()
        clip = trainer.gradient_clip_val
        if clip is not None and not clip >= 0:
            raise ValueError(f"gradient_clip_val {clip}: expected a norm of at least 0 (0 clips nothing)")
        if trainer.gradient_clip_algorithm == "value":
            raise ValueError("gradient_clip_algorithm value: gradients are clipped by their norm; leave it out")
        if isinstance(trainer.strategy, ModelParallelStrategy) and self.trainable == "all":
            raise ValueError("trainable all does not run under fsdp: give --model.trainable layers, or ddp")

    def lighten(self, precision: str, deepspeed: bool) -> None:
        """In bf16, hold what is never trained as the forward would make it at each step: half the memory, no
        conversion. Under autocast norms and embeddings stay, so the stream stays in fp32 and the numbers are the same;
        DeepSpeed and bf16-true run everything in bf16, and convert the student themselves."""
        if not precision.startswith("bf16"):
            return
        if deepspeed or precision == "bf16-true":
            move(self.teacher.model, torch.bfloat16)
            return
        for model, trained in ((self.teacher.model, frozenset()), (self.student_model, self.trained)):
            head = model.get_output_embeddings()
            for name, part in model.named_modules():
                if isinstance(part, nn.Linear) and part is not head and f"{name}.weight" not in trained:
                    move(part, torch.bfloat16)
        self.share()

    def alike(self, layers: bool = True) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Frozen parameters of the student, each with that of the teacher which it was made from, if it has its shape
        and dtype; without `layers`, those outside of decoder layers."""
        learns = {id(p) for n, p in self.student_model.named_parameters(remove_duplicate=False) if n in self.trained}
        parts = [(_outside(self.student), _outside(self.teacher))]
        for index, layer in enumerate(self.student.layers if layers else ()):
            group = self.groups[index]
            if len(group) == 1 and group[0] < len(self.teacher):
                parts.append((dict(layer.named_parameters()), dict(self.teacher.layers[group[0]].named_parameters())))
        for ours, theirs in parts:
            for name, mine in ours.items():
                other = theirs.get(name.replace(".base_layer.", "."))  # under an adapter
                if other is None or id(mine) in learns:
                    continue
                if (mine.shape, mine.dtype) == (other.shape, other.dtype):
                    yield mine, other

    def share(self) -> None:
        """Make one tensor of frozen parameters of student and teacher that are equal bit for bit, where the strategy
        leaves the student's whole."""
        for mine, other in self.alike():
            sharded = hasattr(mine, "ds_id") or hasattr(mine, "full_tensor")
            if not sharded and not mine.is_meta and torch.equal(mine.data, other.data.to(mine.device)):
                other.data = mine.data

    def prepare(self) -> None:
        """Chooses what learns: nothing but the text model and its head, where a model has more."""
        self.student_model.requires_grad_(False)
        for part in (self.student.base, self.student_model.get_output_embeddings()):
            part.requires_grad_(self.trainable == "all")
        for index, layer in enumerate(self.student.layers):
            layer.requires_grad_(self.trainable != "merged" or index in self.merged)

    def on_fit_start(self) -> None:
        self.share()  # again: the strategy has moved the student, and may have converted it
        put_tables(self._tables)
        move(self.teacher.model, self.device)

    def on_train_start(self) -> None:
        self.student_model.eval()

    def configure_model(self) -> None:
        """Under FSDP2 each decoder layer of the student is sharded; everything else is frozen and replicated."""
        mesh = getattr(self, "device_mesh", None)
        if mesh is None or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        self._sharded = True
        for layer in self.student.layers:
            fully_shard(layer, mesh=mesh["data_parallel"])

    def name_of(self, index: int) -> str:
        return f"layer {index}"

    def describe(self, index: int) -> str:
        return f"layer {index} (teacher layers {'+'.join(map(str, self.groups[index]))})"

    # -- optimizer --------------------------------------------------------------------------------------------------

    def rates(self) -> dict[int, float]:
        """Peak rate of each merged layer."""
        return learning_rates(self.lr, self.merged)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group for each merged layer; further groups for what else learns, at the lowest of the rates."""
        rates = self.rates()
        groups: list[dict[str, Any]] = [
            {"name": self.name_of(i), "params": list(self.student.layers[i].parameters()), "lr": rate}
            for i, rate in rates.items()
        ]
        if self.trainable != "merged":
            others = [p for i, la in enumerate(self.student.layers) if i not in rates for p in la.parameters()]
            if others:
                groups.append({"name": OTHERS, "params": others, "lr": self.others_rate()})
        if self.trainable == "all":
            inside = {id(p) for layer in self.student.layers for p in layer.parameters()}
            rest = [p for p in self.student_model.parameters() if id(p) not in inside]
            groups.append({"name": REST, "params": rest, "lr": self.others_rate()})
        every = self.student_model.named_parameters(remove_duplicate=False)
        trained = {id(p) for name, p in every if name in self.trained}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) in trained]
        return [group for group in groups if group["params"]]

    def others_rate(self) -> float:
        return min(self.rates().values())

    def share_of_peak(self, name: str) -> Callable[[int], float]:
        """The rate of a group as a share of its peak, by optimizer step."""
        total, warmup = self.total_steps, self.warmup_steps(self.total_steps)
        return lambda step: cosine(step, total, warmup, self.floor)

    def warmup_steps(self, total: int) -> int:
        return max(1, round(self.warmup * total)) if self.warmup > 0 else 0

    def _planned_steps(self) -> int:
        """Optimizer steps of the run. (`trainer.estimated_stepping_batches` makes the loader before a checkpoint's
        state is there, and Lightning 2.6 then never gives it its place in the data.)"""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps != -1 else []
        if trainer.max_epochs not in (None, -1):
            batches = trainer.datamodule.batches(trainer.limit_train_batches)  # type: ignore[attr-defined]
            limits.append(-(-batches // trainer.accumulate_grad_batches) * trainer.max_epochs)  # type: ignore[operator]
        if not limits:
            raise ValueError("the number of steps is not known: give --trainer.max_epochs or --trainer.max_steps")
        return max(1, min(limits))

    def configure_optimizers(self) -> Any:
        self.total_steps = self._planned_steps()
        groups = self.parameter_groups()
        settings = {"lr": max(g["lr"] for g in groups), "weight_decay": self.weight_decay}
        fused = getattr(self.trainer.strategy, "offloads", False)  # its loop over tensors is slow on a CPU
        optimizer = torch.optim.AdamW(groups, **settings, fused=fused or None)
        shares = [self.share_of_peak(group["name"]) for group in groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- steps ------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalar losses by name; their sum is trained. A merged layer's loss bears its `name_of`."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self._watch(losses)
        total = torch.stack(list(losses.values())).sum()
        # Lightning divides by the batches of a step, and so does a strategy that accumulates by itself
        twice = self.trainer.strategy.handles_gradient_accumulation
        return total * self.trainer.accumulate_grad_batches if twice else total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        total = torch.stack(list(self.losses(batch).values())).sum()
        windows = batch["mask"].any(1).sum()  # 0 where several devices leave one with padding alone
        sums = torch.stack([torch.where(windows > 0, total * windows, 0.0), windows])
        loss, count = self.trainer.strategy.reduce(sums, reduce_op="sum")  # on all ranks: none may wait for another
        self.log("val_loss", loss / count, sync_dist=True, batch_size=int(count))

    def _watch(self, losses: dict[str, Tensor]) -> None:
        """Stops at a loss that is not finite or exploded, on all ranks alike, before it reaches the weights."""
        values = torch.stack([v.detach().float() for v in losses.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        self.latest = dict(zip(losses, values.tolist()))
        for name, value in self.latest.items():
            mean = self._means.get(name)
            if not math.isfinite(value):
                raise Diverged(f"{self._where(name)}: the loss is {value} at step {self.global_step}")
            if mean is not None and value > self.explode * mean and value > 1e-3:
                raise Diverged(
                    f"{self._where(name)}: the loss is {value:.4g} at step {self.global_step}, "
                    f"{value / mean:.0f} times its running mean"
                )
            self._means[name] = value if mean is None else 0.9 * mean + 0.1 * value

    def _where(self, name: str) -> str:
        found = [i for i in self.merged if self.name_of(i) == name]
        return self.describe(found[0]) if found else name

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Refuses gradients that are not finite, naming their layer; then clips, each layer by itself in CoMe-mp.

        Layers whose turn has not come (on several devices they have gradients all the same) take no part.
        """
        groups = []
        for group in optimizer.param_groups:
            if group.get("name") in self.waiting():
                for parameter in group["params"]:
                    parameter.grad = None
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:  # not its turn, or held by DeepSpeed, which clips by itself
                continue
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if not bool(torch.isfinite(norm)) and str(self.trainer.precision) != "16-mixed":
                name = self._where(group.get("name", "?"))
                raise Diverged(f"{name}: the gradient is not finite at step {self.global_step}")
            groups.append((gradients, norm))
        if not gradient_clip_val or not groups:
            return
        whole = torch.stack([norm for _, norm in groups]).norm()
        for gradients, norm in groups:
            scale = gradient_clip_val / ((norm if self.clips_each_layer else whole) + 1e-6)
            if bool(scale < 1):
                for gradient in gradients:
                    gradient.mul_(float(scale))

    def waiting(self) -> Collection[str]:
        """Parameter groups that do not learn yet."""
        return ()

    # -- forwards ---------------------------------------------------------------------------------------------------

    def teacher_states(self, batch: dict[str, Any], wanted: Collection[int], stop: int | None) -> tuple[Any, Tensor]:
        """The teacher's stream at the wanted boundaries, as large as the student's is to be, and its final hidden
        states (of use if `stop` is None)."""
        with torch.no_grad(), streams(self.teacher, wanted) as found:
            final = self.teacher.run(batch["input_ids"], attention_mask(batch["mask"]), stop=stop)
        if self.scales is not None:
            found = {boundary: stream * self.scales[boundary] for boundary, stream in found.items()}
        return found, final

    def student_states(self, batch: dict[str, Any], wanted: Collection[int]) -> tuple[dict[int, Tensor], Tensor]:
        """The student's own stream at the wanted boundaries, and its final hidden states."""
        swap: dict[int, nn.Module] = {}
        if self.activation_checkpointing and torch.is_grad_enabled():
            swap = {i: _Checkpointed(layer) for i, layer in enumerate(self.student.layers)}
        with streams(self.student, wanted) as found:
            final = self.student.run(batch["input_ids"], attention_mask(batch["mask"]), swap=swap)
        return found, final

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep = {f"student_model.{name}" for name in self.trained}
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["loss_means"] = self._means

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._means = dict(checkpoint.get("loss_means", {}))

    def finish(self) -> None:
        """Called once training is over: the student becomes a stock model again."""
