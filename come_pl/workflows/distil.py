"""One distillation, from a run folder of `prune.py` to a run folder with the recovered model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from come_pl import models
from come_pl.data import DistillationData, TokenWindows
from come_pl.decoder import Decoder
from come_pl.distillation.curves import Curves
from come_pl.distillation.module import DistillationModule, Diverged
from come_pl.distillation.student import Pruned, check_fit, read_pruned
from come_pl.offload import Offload, move
from come_pl.record import Meter
from come_pl.runs import Run, RunError, check_space, digest, read_run
from come_pl.workflows.card import distilled_card, licence_files
from come_pl.workflows.report import ask, finish
from come_pl.workflows.texts import EvaluationText, evaluation_windows, measure

ROOT = Path("runs/distill")
CHECKPOINTS = "checkpoints"


def distil(
    module: DistillationModule,
    data: DistillationData,
    trainer: Trainer,
    *,
    method: str,
    options: Mapping[str, Any],
    student: str | None = None,
    teacher: str | None = None,
    evaluation: EvaluationText | None = None,
    output: Path | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 50,
    patience: int | None = None,
    samples: bool = True,
    offload: Offload = "none",
) -> Path | None:
    """Distil a student run folder and write a run folder; a run that was killed goes on from its last checkpoint.

    Args:
        module: a method of `registry.METHODS`, not yet attached.
        options: the settings of the method, as they are told in `run.json`.
        student: run folder of `prune.py`; by default runs/prune/latest.
        teacher: the dense model; by default the one that the student was pruned from.
        save_every: optimizer steps between two checkpoints.
        patience: stop after this many validations without a lower loss; None: never.
        samples: let the models continue a few words at the end, for the report.
        offload: where the teacher's matrices are while they are not used, see `models.load_model`.

    Returns:
        The run folder, or None on processes other than the first.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    main = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    evaluation = evaluation or EvaluationText()
    pruned = read_pruned(student)
    path = teacher or pruned.teacher
    dense_config = models.load_config(path)
    tokenizer = models.load_tokenizer(path)
    check_fit(pruned, dense_config, tokenizer, path)
    bos = models.needs_bos(dense_config, tokenizer)
    data.attach(tokenizer, bos=bos, seed=seed)
    identity = _identity(module, data, trainer, pruned, path, method, options, seed)
    output = output or ROOT / f"{pruned.folder.resolve().name}-{method}-{digest(identity)}"
    if resume and not (output / "run.json").is_file():
        raise RunError(f"--resume: {str(output)!r} holds no run to go on with; run without --resume")
    run = Run(output, identity, overwrite=overwrite, main=main)
    if run.finished:
        print(f"{output} is finished already; --overwrite runs it again")
        print(summary(run.info))
        return output
    texts = evaluation_windows(evaluation, tokenizer, bos, data.seqlen) if main else {}

    student_model = models.load_model(str(pruned.folder / "model"), "float32")
    check_space(output, 6 * 4 * models.parameter_count(student_model) / GIB)
    dense_model = models.load_model(path, offload=offload)
    device = trainer.strategy.root_device
    if main:
        run.update(
            student={"run": str(pruned.folder), "groups": pruned.groups},
            model={"path": path, "layers": len(Decoder(dense_model)), "dtype": pruned.dtype},
            method={"name": method, **options},
            data={"source": data.source, "tokens": data.tokens, "seqlen": data.seqlen, "batch_size": data.batch_size},
            seed=seed,
        )
        if "perplexity" not in run.info:
            known = _known(pruned, texts)
            known = measure(move(dense_model, device), texts, "dense", known)
            known = measure(student_model.to(device), texts, "before", known)
            run.update(perplexity=known)
    module.attach(dense_model, student_model, pruned.groups)
    _lighten(module, trainer)
    curves = Curves(output)
    trainer.callbacks += [curves, *_checkpointing(output, save_every, patience, data)]  # type: ignore[attr-defined]
    if phases := getattr(module, "phases", 1) - 1:
        _lengthen(trainer, phases + 1)
    meter = Meter(device)
    checkpoint = _newest(output / CHECKPOINTS)
    if checkpoint and main:
        print(f"going on from {checkpoint.name}")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    except Diverged as error:
        raise Diverged(f"{error}; {_keep_good(output)}. Try a lower --model.lr") from None
    state = full_state(module, trainer)
    if not main:
        return None
    if trainer.interrupted:
        print("stopped before the end; the same command goes on from the last checkpoint")
        return output
    # before adapters are merged; ZeRO-3 keeps parameters in parts
    parameters = dict(module.student_model.named_parameters())
    trained = sum(getattr(parameters[n], "ds_numel", parameters[n].numel()) for n in module.trained if n in parameters)
    seconds, peak = curves.seconds, meter.peak_gib
    best = _best(trainer)
    if best is not None:
        state = best
    del trainer.optimizers[:]  # type: ignore[attr-defined]
    final = rebuilt(module, pruned, state, method)
    entries = measure(final.to(device), texts, "after", run.info["perplexity"])
    run.update(
        perplexity=entries,
        seconds=round(seconds, 2),
        tokens_seen=curves.tokens,
        tokens_per_second=round(curves.tokens / max(seconds, 1e-9), 1),
        trained_parameters=trained,
        parameters=models.parameter_count(final),
        peak_gib=round(peak, 3),
        steps=trainer.global_step,
        devices=trainer.world_size,
        groups=pruned.groups,
    )
    card = distilled_card(run.info, read_run(pruned.folder))
    models.save_model(final.to("cpu"), output / "model", tokenizer, card, licence_files(path))
    if (pruned.folder / "record.jsonl").is_file():
        shutil.copyfile(pruned.folder / "record.jsonl", output / "record.jsonl")
    run.update(status="finished")
    # what the dense and the pruned model say is the pruning run's to know: here they may be sharded or in bf16
    loaders = {"recovered": lambda: final.to(device)}
    finish(output, partial(ask, output, loaders, tokenizer, known=pruned.folder) if samples else None)
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    if output.parent.resolve() == ROOT.resolve():
        run.make_latest()
    print(summary(run.info))
    print(f"written to {output}")
    return output


GIB = 2**30


def _identity(
    module: DistillationModule,
    data: DistillationData,
    trainer: Trainer,
    pruned: Pruned,
    teacher: str,
    method: str,
    options: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    return {
        "student": str(pruned.folder.resolve()),
        "teacher": teacher,
        "method": {"name": method, **options},
        "data": {n: getattr(data, n) for n in ("source", "tokens", "seqlen", "batch_size", "validation_tokens")},
        "trainer": {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "devices": trainer.world_size,
        },
        "seed": seed,
    }


def _lighten(module: DistillationModule, trainer: Trainer) -> None:
    """Under bf16 autocast, hold what is never trained as autocast would make it at each step: the same numbers, half
    the memory, no conversion. (Norms and embeddings stay, so the stream stays in fp32.)"""
    precision = str(trainer.precision)
    if precision == "bf16-true":
        move(module.teacher.model, torch.bfloat16)
    elif precision == "bf16-mixed" and "DeepSpeed" not in type(trainer.strategy).__name__:
        for model, trained in ((module.teacher.model, frozenset()), (module.student_model, module.trained)):
            head = model.get_output_embeddings()
            for name, part in model.named_modules():
                if isinstance(part, nn.Linear) and part is not head and f"{name}.weight" not in trained:
                    move(part, torch.bfloat16)


def _lengthen(trainer: Trainer, phases: int) -> None:
    """One layer after another: what the user says of epochs and steps is meant for each."""
    if trainer.max_epochs not in (None, -1):
        trainer.fit_loop.max_epochs = trainer.max_epochs * phases  # type: ignore[operator]
    if trainer.max_steps != -1:
        trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps * phases


def _checkpointing(output: Path, every: int, patience: int | None, data: DistillationData) -> list[Any]:
    folder = output / CHECKPOINTS
    callbacks: list[Any] = [
        ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=every, save_top_k=1, save_on_train_epoch_end=False
        )
    ]
    if data.validation_tokens:
        best: dict[str, Any] = {"monitor": "val_loss", "mode": "min", "save_top_k": 1, "save_weights_only": True}
        callbacks.append(ModelCheckpoint(folder / "best", filename="{step}-{val_loss:.5g}", **best))
        if patience is not None:
            callbacks.append(EarlyStopping("val_loss", patience=patience, check_finite=True))
    return callbacks


def _newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step that was written whole."""
    found = [p for p in folder.glob("step=*.ckpt") if p.is_file() or (p / "checkpoint").is_dir()]
    return max(found, key=lambda p: int("".join(c for c in p.stem.split("=")[1] if c.isdigit())), default=None)


def _best(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Trained weights of the lowest validation loss, if an earlier step had it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            file = Path(callback.best_model_path)
            if file.is_file():
                stored = torch.load(file, map_location="cpu", weights_only=True)
                if stored["global_step"] < trainer.global_step:
                    print(f"keeping the weights of step {stored['global_step']}: lowest validation loss")
                    prefix = "student_model."
                    return {k.removeprefix(prefix): v for k, v in stored["state_dict"].items()}
    return None


def _keep_good(output: Path) -> str:
    newest = _newest(output / CHECKPOINTS)
    return f"the last good weights are in {newest}" if newest else "no step was saved yet: the student is unchanged"


def full_state(module: DistillationModule, trainer: Trainer) -> dict[str, torch.Tensor]:
    """Trained parameters of the student, whole, on the CPU, whatever strategy shards them. Called on all ranks."""
    state = {}
    for name, parameter in module.student_model.named_parameters():
        if name not in module.trained:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().cpu().clone()
        elif hasattr(parameter, "full_tensor"):
            state[name] = parameter.full_tensor().detach().cpu()
        else:
            state[name] = parameter.detach().cpu().clone()
    return state


def rebuilt(module: DistillationModule, pruned: Pruned, state: Mapping[str, torch.Tensor], method: str) -> Any:
    """The student as it was pruned, with the trained weights: a plain model in the dtype that it had."""
    model = models.load_model(str(pruned.folder / "model"), "float32")
    if method == "lora":
        module.student_model, module.student = model, Decoder(model)
        module.prepare()
    lacking, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected, unexpected
    module.student_model, module.student = model, Decoder(model)
    module.finish()
    models.check_finite(model, "the distilled model")
    model.requires_grad_(False)
    return model.to(getattr(torch, pruned.dtype)).eval()


def _known(pruned: Pruned, texts: Mapping[str, TokenWindows]) -> dict[str, Any]:
    """What pruning measured already on the same windows."""
    known: dict[str, Any] = {}
    for name, windows in texts.items():
        predicted, seqlen = len(windows) * (windows.input_ids.shape[1] - 1), windows.input_ids.shape[1]
        known[name] = {"tokens": predicted, "seqlen": seqlen}
        entry = pruned.perplexity.get(name, {})
        if entry.get("tokens") == predicted and entry.get("seqlen") == seqlen:
            known[name] |= {"dense": entry["dense"], "before": entry["pruned"]}
    return known


def summary(info: Mapping[str, Any]) -> str:
    """What a run did, in a few lines for the terminal."""
    lines = []
    for name, entry in info["perplexity"].items():
        lines.append(
            f"perplexity  {entry['before']:.2f} → {entry['after']:.2f} (dense {entry['dense']:.2f}; "
            f"{entry['before'] / entry['dense']:.2f}× → {entry['after'] / entry['dense']:.2f}×) on {entry['tokens']} "
            f"held-out tokens of {Path(name).name}"
        )
    lines.append(
        f"trained     {info['trained_parameters'] / 1e6:.1f}M of {info['parameters'] / 1e6:.1f}M parameters on "
        f"{info['tokens_seen']} tokens in {info['steps']} steps"
    )
    lines.append(
        f"cost        {info['seconds']:.0f} s, {info['tokens_per_second']:.0f} tokens/s, peak memory "
        f"{info['peak_gib']:.2f} GiB"
    )
    return "\n".join(lines)
