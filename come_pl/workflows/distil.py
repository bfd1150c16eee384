"""One distillation, from a run folder of `prune.py` to a run folder with the recovered model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_only

from come_pl import models
from come_pl.data import DistillationData, TokenWindows
from come_pl.decoder import Decoder
from come_pl.distillation.checkpoints import (
    BEST,
    FOLDER,
    Checkpoints,
    KeepBest,
    Patience,
    full_state,
    newest,
    trained_count,
)
from come_pl.distillation.curves import Curves
from come_pl.distillation.module import DistillationModule, Diverged
from come_pl.distillation.plan import loaded_dtype
from come_pl.distillation.strategy import checkpoint_of
from come_pl.distillation.student import Pruned, check_fit, read_pruned
from come_pl.offload import Offload, move
from come_pl.record import Meter
from come_pl.report.style import amount, number
from come_pl.runs import Run, RunError, check_launcher, check_space, digest, read_run
from come_pl.windows import check_readable
from come_pl.workflows.card import distilled_card, licence_files
from come_pl.workflows.report import ask, finish
from come_pl.workflows.texts import EvaluationText, evaluation_windows, measure, measured_on

ROOT = Path("runs/distill")


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
        patience: stop after this many validations without a lower loss; None: never. Either way the weights of the
            lowest validation loss are what is saved.
        samples: let the models continue a few words at the end, for the report.
        offload: where the teacher's matrices are while they are not used, see `models.load_model`.

    Returns:
        The run folder, or None on processes other than the first.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    main = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if save_every < 1:
        raise ValueError(f"save_every {save_every}: expected at least 1 optimizer step between two checkpoints")
    if patience is not None and not trainer.limit_val_batches:
        raise ValueError(f"patience {patience}: without a validation (limit_val_batches 0) it never stops")
    stopping = [Patience(patience)] if patience is not None else []
    trainer.callbacks += stopping  # type: ignore[attr-defined]
    _check_trainer(trainer)
    module.check_trainer(trainer)
    evaluation = evaluation or EvaluationText()
    pruned = read_pruned(student)
    module.correspond(pruned.groups)
    path = teacher or pruned.teacher
    dense_config = models.load_config(path)
    tokenizer = models.load_tokenizer(path)
    check_fit(pruned, dense_config, tokenizer, path)
    bos = models.needs_bos(dense_config, tokenizer)
    data.attach(tokenizer, bos=bos, seed=seed)
    _check_batches(trainer, data)
    identity = _identity(data, trainer, pruned, path, method, options, seed, patience)
    output = output or ROOT / f"{pruned.folder.resolve().name}-{method}-{digest(identity)}"
    if resume and not (output / "run.json").is_file():
        raise RunError(f"--resume: {str(output)!r} holds no run to go on with; run without --resume")
    texts = evaluation_windows(evaluation, tokenizer, bos, data.seqlen) if main else {}
    found = [data.windows, data.validation, *texts.values()]
    check_readable([windows for windows in found if windows is not None], dense_config, path)
    reads = [("--student", str(pruned.folder)), ("--teacher", path), ("--data.source", data.source)]
    reads += [("--evaluation.data", text) for text in evaluation.data]
    run = Run(output, identity, overwrite=overwrite, main=main, reads=reads)
    with run:
        deepspeed = isinstance(trainer.strategy, DeepSpeedStrategy)
        dtype = loaded_dtype(pruned.dtype, str(trainer.precision), deepspeed)
        student_model = models.load_model(str(pruned.folder / "model"), dtype)
        marks = _marks(student_model, data)
        _check_marks(run, marks)
        if run.finished:
            print(f"{output} is finished already; --overwrite runs it again")
            print(summary(run.info))
            return output
        written = checkpoint_of(trainer)
        if run.info.get("checkpoints", written) != written and newest(output / FOLDER):
            raise RunError(
                f"the checkpoint in {str(output)!r} is {run.info['checkpoints']}, and this run's would be {written}; "
                "go on with the --trainer.strategy and --trainer.devices that it began with, or --overwrite"
            )
        size = 4 * models.parameter_count(student_model)
        check_space(output, size / GIB)
        device = trainer.strategy.root_device
        dense_model = models.load_model(path, offload=offload, accelerated=device.type != "cpu")
        if main:
            if pruned.adapted and module.reach()[0]:  # not up to the head, nor nothing of the teacher
                print(
                    f"--distill {method} leads layers to the dense model's stream, and this student was repaired or "
                    "trained before: that can make it worse; --distill hybrid learns from predictions, too"
                )
            run.update(
                student={"run": str(pruned.folder), "groups": pruned.groups, **marks["student"]},
                model={"path": path, "layers": len(Decoder(dense_model)), "dtype": pruned.dtype},
                method={"name": method, **options},
                data={n: getattr(data, n) for n in ("source", "tokens", "seqlen", "batch_size")} | marks["data"],
                seed=seed,
                checkpoints=written,
            )
            known = run.info.get("perplexity") or _known(pruned, texts, path)
            known = measure(dense_model, texts, "dense", known, device)
            known = measure(student_model, texts, "before", known, device)
            if known != run.info.get("perplexity"):  # another text than before it was cut off, or the first time
                run.update(perplexity=known)
        module.attach(dense_model, student_model, pruned.groups, pruned.scales, pruned.adapted)
        saved = size if deepspeed else 4 * trained_count(module)
        check_space(output, (7 * saved + size) / GIB)  # two checkpoints, the best weights, the model
        module.lighten(str(trainer.precision), deepspeed)
        curves = Curves(output)
        best = KeepBest(output / FOLDER / BEST)
        trainer.callbacks += [curves, best, Checkpoints(output / FOLDER, save_every)]  # type: ignore[attr-defined]
        if phases := getattr(module, "phases", 1) - 1:
            _lengthen(trainer, phases + 1)
        meter = Meter(device)
        checkpoint = newest(output / FOLDER) if run.resumed else None
        if checkpoint and main:
            print(f"going on from {checkpoint.name}")
        try:
            trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
        except Diverged as error:
            raise Diverged(f"{error}; {_keep_good(output)}. Try a lower --model.lr") from None
        if trainer.interrupted:
            if main:
                print("stopped before the end; the same command goes on from the last checkpoint")
            return output if main else None
        state = best.last
        if state is None:  # all was trained before
            move(module.student_model, device)  # where its strategy can gather it: it has moved it to the CPU
            state = full_state(module)
        if not main:
            return None
        trained, seconds, peak = trained_count(module), curves.seconds, meter.peak_gib
        stopped = any(callback.exhausted for callback in stopping)
        if stopped:
            print(f"stopped after step {trainer.global_step}: {patience} validations without a lower loss")
        kept, lowest = trainer.global_step, best.loss if math.isfinite(best.loss) else None
        if best.step is not None and best.step < trainer.global_step:
            kept, state = best.step, best.weights()
            print(f"keeping the weights of step {kept}: lowest validation loss ({best.loss:.5g})")
        del trainer.optimizers[:]  # type: ignore[attr-defined]
        final = rebuilt(module, pruned, state, method)
        move(module.teacher.model, "cpu")
        entries = measure(final, texts, "after", run.info["perplexity"], device)
        run.update(
            perplexity=entries,
            seconds=round(seconds, 2),
            tokens_seen=curves.tokens,
            tokens_per_second=round(curves.tokens / max(seconds, 1e-9), 1),
            trained_parameters=trained,
            parameters=models.parameter_count(final),
            peak_gib=round(peak, 3),
            steps=trainer.global_step,
            validation={"stopped_early": stopped, "kept_step": kept, "lowest_loss": lowest, "of_step": best.step},
            devices=trainer.world_size,
            groups=pruned.groups,
            scales=pruned.scales,
        )
        card = distilled_card(run.info, read_run(pruned.folder))
        models.save_model(final.to("cpu"), output / "model", tokenizer, card, licence_files(path))
        if (pruned.folder / "record.jsonl").is_file():
            shutil.copyfile(pruned.folder / "record.jsonl", output / "record.jsonl")
        run.update(status="finished")
        # what the dense and the pruned model say is the pruning run's to know: here they may be sharded or in bf16
        loaders = {"recovered": lambda: final.to(device)}
        finish(output, partial(ask, output, loaders, tokenizer, known=pruned.folder) if samples else None)
        run.close(ROOT, FOLDER)
        print(summary(run.info))
        print(f"written to {output}")
        return output


GIB = 2**30


def _identity(
    data: DistillationData,
    trainer: Trainer,
    pruned: Pruned,
    teacher: str,
    method: str,
    options: Mapping[str, Any],
    seed: int,
    patience: int | None,
) -> dict[str, Any]:
    """What decides the result; what is rarely set is told only where it is."""
    rare = {"streaming": data.streaming or None, "patience": patience}
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
            **_unusual(trainer),
        },
        "seed": seed,
        **{k: v for k, v in rare.items() if v is not None},
    }


USUAL = {
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
}


def _unusual(trainer: Trainer) -> dict[str, Any]:
    """Settings that decide the result and are rarely set, where they are. (1 is a batch, and 1.0 is all of them.)"""
    timers = [callback._duration for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    found = {name: getattr(trainer, name, usual) for name, usual in USUAL.items()}
    every = getattr(trainer, "_val_check_time_interval", None)
    found |= {"max_seconds": timers[0] if timers else None, "val_check_seconds": every}
    return {name: value for name, value in found.items() if repr(value) != repr(USUAL.get(name))}


def _check_trainer(trainer: Trainer) -> None:
    """Raises ValueError for settings that no method can run under."""
    for name, least in (("accumulate_grad_batches", "1 batch"), ("check_val_every_n_epoch", "1 epoch")):
        value = getattr(trainer, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: expected at least {least}")
    for name in ("max_steps", "max_epochs"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"{name} 0: nothing would be trained; expected at least 1")
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ValueError("max_epochs -1: the number of steps is not known; give max_epochs or max_steps")
    if str(trainer.precision) == "16-true":
        raise ValueError(
            "precision 16-true: weights in float16 do not train; expected 32-true, bf16-mixed or bf16-true"
        )
    check_launcher(trainer.strategy)


def _check_batches(trainer: Trainer, data: DistillationData) -> None:
    """Raises ValueError where no batch would be trained on, never a validation come, or batches be left over that
    DeepSpeed would take into the next epoch."""
    data.trainer = trainer  # the loader's length depends on the number of processes
    limit, interval = trainer.limit_train_batches, getattr(trainer, "val_check_interval", 1.0)
    batches = data.batches(limit)
    if not batches:
        raise ValueError(f"limit_train_batches {limit}: leaves none of {data.batches(1.0)} batches to train on")
    each = trainer.accumulate_grad_batches
    within = trainer.max_steps != -1 and trainer.max_steps * each <= batches
    if isinstance(trainer.strategy, DeepSpeedStrategy) and batches % each and not within:
        whole = batches - batches % each
        raise ValueError(
            f"accumulate_grad_batches {each}: an epoch has {batches} batches, and DeepSpeed would carry over what is "
            f"left; give a divisor of them" + (f", or --trainer.limit_train_batches {whole}" if whole else "")
        )
    in_epoch = isinstance(interval, int) and trainer.check_val_every_n_epoch is not None
    if not interval or in_epoch and interval > batches and trainer.limit_val_batches:
        raise ValueError(
            f"val_check_interval {interval}: an epoch has {batches} training batches; expected at least 1 and no more "
            "than these, or a share of the epoch such as 0.5 (--trainer.limit_val_batches 0: no validation)"
        )


def _marks(student: Any, data: DistillationData) -> dict[str, dict[str, str]]:
    """Fingerprints of what a run reads, by the part of `run.json` that they stand in."""
    texts = {"fingerprint": data.windows, "validation_fingerprint": data.validation}
    return {
        "student": {"fingerprint": models.fingerprint(student)},
        "data": {name: windows.fingerprint for name, windows in texts.items() if windows is not None},
    }


def _check_marks(run: Run, marks: Mapping[str, Mapping[str, str]]) -> None:
    """Raises RunError: a student or a text that is another than the run in this folder began with."""
    for part, found in marks.items():
        for name, mark in found.items():
            if run.info.get(part, {}).get(name, mark) != mark:
                what = "weights of the student" if part == "student" else "windows of the text"
                raise RunError(
                    f"the {what} are not those that the run in {str(run.folder)!r} began with; give another --output, "
                    "or --overwrite to replace it"
                )


def _lengthen(trainer: Trainer, phases: int) -> None:
    """One layer after another: what the user says of epochs and steps is meant for each."""
    if trainer.max_epochs not in (None, -1):
        trainer.fit_loop.max_epochs = trainer.max_epochs * phases  # type: ignore[operator]
    if trainer.max_steps != -1:
        trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps * phases


def _keep_good(output: Path) -> str:
    good = newest(output / FOLDER)
    return f"the last good weights are in {good}" if good else "no step was saved yet: the student is unchanged"


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
    return move(model, getattr(torch, pruned.dtype)).eval()


def _known(pruned: Pruned, texts: Mapping[str, TokenWindows], teacher: str) -> dict[str, Any]:
    """What pruning measured already on the same windows; of the dense model if this is the teacher."""
    known: dict[str, Any] = {}
    same = Path(teacher).expanduser().resolve() == Path(pruned.teacher).expanduser().resolve()
    for name, windows in texts.items():
        entry = pruned.perplexity.get(name, {})
        if measured_on(windows, entry):
            kept = ("tokens", "seqlen", "fingerprint", *(["dense"] if same else []))
            known[name] = {key: entry[key] for key in kept if key in entry} | {"before": entry["pruned"]}
    return known


def summary(info: Mapping[str, Any]) -> str:
    """What a run did, in a few lines for the terminal."""
    lines = []
    for name, entry in info["perplexity"].items():
        lines.append(
            f"perplexity  {number(entry['before'])} → {number(entry['after'])} (dense {number(entry['dense'])}; "
            f"{number(entry['before'] / entry['dense'])}× → {number(entry['after'] / entry['dense'])}×) on "
            f"{entry['tokens']} held-out tokens of {Path(name).name}"
        )
    worse = [Path(name).name for name, entry in info["perplexity"].items() if entry["after"] > entry["before"]]
    if worse:
        lines.append(
            f"worse than before training on {', '.join(worse)}: take {info['student']['run']}, or train further"
        )
    lines.append(
        f"trained     {amount(info['trained_parameters'])} of {amount(info['parameters'])} parameters on "
        f"{info['tokens_seen']} tokens in {info['steps']} steps"
    )
    lines.append(
        f"cost        {info['seconds']:.0f} s, {info['tokens_per_second']:.0f} tokens/s, peak memory "
        f"{info['peak_gib']:.2f} GiB"
    )
    return "\n".join(lines)
