"""The memory plan of a distillation, from configs alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from come_pl.decoder import Decoder
from come_pl.distillation.losses import CHUNK_BYTES
from come_pl.distillation.module import DistillationModule
from come_pl.models import on_meta
from come_pl.offload import Offload, matrices

GIB = 2**30
CHUNKS = 6  # as many times a chunk's logits in fp32 are there at once; measured


@dataclass(frozen=True)
class Plan:
    """GiB on each device; `host` is what offloading moves to the CPU's memory, for each device, and `loading` what each
    of the `processes` of a machine has there before its models are where they are trained.

    `teacher` is what the teacher holds by itself: layers that no loss needs are let go, and frozen layers that the
    student has unchanged count with the student (`shared` GiB of it).
    """

    teacher: float
    student: float
    gradients: float
    optimizer: float
    activations: float
    host: float = 0.0
    shared: float = 0.0
    trained: int = 0
    parameters: int = 0
    loading: float = 0.0
    processes: int = 1

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.gradients + self.optimizer + self.activations

    def table(self, title: str) -> str:
        rows = [
            (f"teacher (and {self.shared:.3f} GiB shared)" if self.shared else "teacher", self.teacher),
            (f"student ({self.parameters / 1e6:.1f}M parameters)", self.student),
            (f"gradients ({self.trained / 1e6:.1f}M trained)", self.gradients),
            ("optimizer states", self.optimizer),
            ("activations", self.activations),
            ("total per device", self.total),
            *([("host memory per device, offloaded", self.host)] if self.host else []),
            (f"host memory, {self.processes} process(es) loading", self.loading * self.processes),
        ]
        return "\n".join([title, *(f"  {name:<38}{value:9.3f} GiB" for name, value in rows)])


def held(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(p.numel() * p.element_size() for p in parameters)


def activation_bytes(decoder: Decoder, tokens: int, element: int) -> int:
    """Kept for the backward of one decoder layer: inputs of norms in fp32 (2 + 2 hidden), of projections and of the
    activation function in the compute dtype. Attention by blocks: no (seq × seq) matrix."""
    g = decoder.geometry
    attention = 2 * g.hidden + g.head_dim * (2 * g.heads + 2 * g.kv_heads)
    return tokens * (4 * 4 * g.hidden + element * (attention + g.hidden + 4 * g.ffn))


def memory_plan(
    module: DistillationModule,
    *,
    precision: str,
    strategy: str,
    devices: int,
    batch_size: int,
    seqlen: int,
    offload: Offload = "none",
) -> Plan:
    """GiB per device of a module attached to models on the meta device (`on_meta`), which are made as light as the
    precision lets them be.

    Args:
        offload: where the matrices of the teacher's layers are; one of them at a time is on the device.
    """
    half = precision.startswith("bf16") or precision.startswith("16")
    true_half = precision in ("bf16-true", "16-true")
    deepspeed, fsdp = strategy.startswith("deepspeed"), strategy == "fsdp"
    stage = next((int(c) for c in strategy if c.isdigit()), 2 if strategy == "deepspeed" else 0) if deepspeed else 0
    named = dict(module.student_model.named_parameters())
    trained = sum(p.numel() for n, p in named.items() if n in module.trained)
    if getattr(module, "schedule", "joint") == "sequential":
        trained //= len(module.merged)
    everything = sum(p.numel() for p in named.values())
    low = 2 if half and (deepspeed or true_half) else 4
    if low == 2:  # DeepSpeed and Lightning convert the whole student
        module.student_model.to(torch.bfloat16)
    module.lighten(precision, deepspeed)
    sharded = fsdp or stage == 3
    away = [p for layer in module.teacher.layers for p in matrices(layer)] if offload != "none" else []
    gone = {id(p) for p in away}
    # layers that were neither merged nor fitted are taken to be equal
    alike = module.alike(layers=not module.adapted)
    shared = 0 if sharded else held(theirs for _, theirs in alike if id(theirs) not in gone)
    teacher = held(p for p in module.teacher.model.parameters() if id(p) not in gone) - shared
    teacher += max((held([p]) for p in away), default=0)
    student: float = held(module.student_model.parameters())
    gradients = trained * low
    optimizer = trained * (8 if low == 4 or not deepspeed else 12) if not true_half or deepspeed else trained * 4
    share = max(1, devices)
    if sharded:
        layers = held(module.student.layers.parameters()) if fsdp else student
        student = student - layers + layers / share + module.student.layer_parameters * low  # one layer is gathered
    if fsdp or stage >= 2:
        gradients /= share
    if fsdp or stage >= 1:
        optimizer /= share
    host = float(held(away)) if offload == "cpu" else 0.0
    if "offload" in strategy:
        host += optimizer
        optimizer = 0
        if stage == 3:
            host += student
            student = module.student.layer_parameters * low * 2
    return Plan(
        teacher / GIB,
        student / GIB,
        gradients / GIB,
        optimizer / GIB,
        _activations(module, batch_size * seqlen, 2 if half else 4) / GIB,
        host / GIB,
        shared / GIB,
        trained,
        everything,
    )


def loaded_dtype(stored: str, precision: str, deepspeed: bool) -> str:
    """What a student is read in: as it is stored where DeepSpeed computes in bf16, which makes its fp32 copies from
    bf16 weights; else in fp32."""
    return stored if deepspeed and precision.startswith("bf16") else "float32"


def held_while_loading(teacher: Any, student: Any, dtype: str, offload: Offload) -> float:
    """Bytes of host memory of both models (on the meta device, the teacher in the dtype that it is read in), whole, as
    each process reads them.

    Args:
        dtype: what the student is read in.
    """
    away = {id(p) for layer in Decoder(teacher).layers for p in matrices(layer)} if offload == "disk" else set()
    ours = getattr(torch, dtype).itemsize * sum(p.numel() for p in student.parameters())
    return held(p for p in teacher.parameters() if id(p) not in away) + ours


def _activations(module: DistillationModule, tokens: int, element: int) -> float:
    decoder = module.student
    hidden = decoder.geometry.hidden
    layer = activation_bytes(decoder, tokens, element)
    stream = 4 * tokens * hidden
    if type(module).__name__ == "CoMeMP":
        local = len(module.merged) if getattr(module, "schedule", "joint") == "joint" else 1
        return local * (layer + 2 * stream) + 2 * layer
    learns = _learning(module)
    lowest = next(i for i, part in enumerate(decoder.layers) if any(id(p) in learns for p in part.parameters()))
    through = len(decoder) - lowest
    kept = through * stream + layer if module.activation_checkpointing else through * layer
    return kept + len(module.merged) * 2 * stream + _head(module, tokens, element) + 2 * tokens * hidden * 4


def _learning(module: DistillationModule) -> set[int]:
    named = module.student_model.named_parameters(remove_duplicate=False)
    return {id(p) for name, p in named if name in module.trained}


def _head(module: DistillationModule, tokens: int, element: int) -> float:
    """For losses of logits: chunks of them, and casts of both heads. Of a head that learns also the gradient summed in
    fp32, and a chunk's: in fp32 and cast (measured on a CPU)."""
    ours, theirs = (d.model.get_output_embeddings() for d in (module.student, module.teacher))
    if not hasattr(ours, "weight"):  # never run, so let go
        return 0
    weights = [head.weight for head in (ours, theirs) if hasattr(head, "weight")]
    kept = CHUNKS * min(CHUNK_BYTES, 4 * ours.weight.shape[0] * tokens)
    kept += sum(element * w.numel() for w in weights if w.element_size() > element)
    if id(ours.weight) in _learning(module):
        kept += ours.weight.numel() * (4 + 4 + element * (element < 4))
    return kept


def device_count(devices: str) -> int:
    """What `--trainer.devices` asks for: a number, a list like `0,1` or `[0, 1]`, or as many as there are."""
    listed = [part for part in devices.strip("[]").split(",") if part.strip()]
    if "," in devices or devices.startswith("["):
        return len(listed)
    return int(devices) if devices.isdigit() else max(1, torch.cuda.device_count())


def print_plan(
    module: DistillationModule,
    data: Any,
    student: str | None,
    teacher: str | None,
    on: Any,
    offload: Offload = "none",
) -> Plan:
    """Print the plan of a run, from configs: a student run folder, or a dense model of which 30 % would be removed."""
    from come_pl import models
    from come_pl.distillation.student import LATEST, check_fit, read_pruned
    from come_pl.runs import target_depth

    module.check_values()
    if student is not None or (teacher is None and LATEST.is_dir()):
        pruned = read_pruned(student)
        path = teacher or pruned.teacher
        dense = models.load_config(path)
        check_fit(pruned, dense, models.load_tokenizer(path), path)
        groups = pruned.groups
        small, adapted = models.load_config(str(pruned.folder / "model")), pruned.adapted
    else:
        path = teacher or "embedded"
        dense = models.load_config(path)
        layers = dense.get_text_config(decoder=True).num_hidden_layers
        depth = target_depth(layers, None, 0.3)
        groups = planned_groups(layers, depth)
        small, adapted = None, False
    accelerated = on["accelerator"] in ("gpu", "cuda") or (on["accelerator"] == "auto" and torch.cuda.is_available())
    stored = str(getattr(small or dense, "dtype", None) or torch.float32).removeprefix("torch.")
    dtype = loaded_dtype(stored, on["precision"], on["strategy"].startswith("deepspeed"))
    dense_model = on_meta(dense, getattr(dense, "dtype", None) or torch.float32) if accelerated else on_meta(dense)
    student_model = on_meta(small if small is not None else dense)
    if small is None:
        decoder = Decoder(student_model)
        decoder.base.layers = torch.nn.ModuleList(list(decoder.layers)[: len(groups)])
    depth = len(Decoder(dense_model))
    read = held_while_loading(dense_model, student_model, dtype, offload)
    module.attach(dense_model, student_model, groups, adapted=adapted)
    processes = device_count(on["devices"])
    devices = processes * int(on["num_nodes"])
    plan = memory_plan(
        module,
        precision=on["precision"],
        strategy=on["strategy"],
        devices=devices,
        batch_size=data.batch_size,
        seqlen=data.seqlen,
        offload=offload,
    )
    plan = replace(plan, loading=read / GIB, processes=processes)
    title = (
        f"{path}, {depth} → {len(groups)} layers, {type(module).__name__} on {devices} device(s), "
        f"{on['strategy']}, {on['precision']}, {data.batch_size} windows of {data.seqlen} tokens"
        + (f", teacher offloaded to {offload}" if offload != "none" else "")
    )
    print(plan.table(title))
    return plan


def planned_groups(layers: int, depth: int) -> list[list[int]]:
    """Correspondences as merging tends to leave them: pairs in the middle of the model."""
    removed = layers - depth
    pairs = min(removed, layers // 3)
    begin = (layers - removed - pairs) // 2
    groups = [[i] for i in range(begin)]
    at = begin
    for rank in range(pairs):
        size = 1 + removed // pairs + (rank < removed % pairs)
        groups.append(list(range(at, at + size)))
        at += size
    return groups + [[i] for i in range(at, layers)]
