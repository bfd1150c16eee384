"""One pruning run, from a dense model to a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from come_pl import models
from come_pl.data import CalibrationData
from come_pl.decoder import Decoder, family_of
from come_pl.offload import move
from come_pl.pruning.last_layers import affordable
from come_pl.pruning.loop import ProgressivePruning, PruningBar, log_step, retires
from come_pl.pruning.methods import find
from come_pl.pruning.methods.base import Method
from come_pl.pruning.methods.shortest_path import BRIDGE
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.record import Meter, Record
from come_pl.report.style import amount, number
from come_pl.runs import RUN_FILE, Run, RunError, check_launcher, check_space, digest, read_run, target_depth
from come_pl.surgery import check_scalable
from come_pl.windows import TokenWindows, check_readable
from come_pl.workflows.card import licence_files, pruned_card
from come_pl.workflows.report import ask, finish
from come_pl.workflows.texts import EvaluationText, dense_of, evaluation_windows, measure

ROOT = Path("runs/prune")
SCRATCH = ".scratch"  # in the run folder: what is not in memory, one folder a process


def prune(
    module: PruningModule,
    data: CalibrationData,
    trainer: Trainer,
    *,
    method: str,
    options: Mapping[str, Any],
    refit: Refit | None = None,
    target_layers: int | None = None,
    sparsity: float | None = None,
    evaluation: EvaluationText | None = None,
    output: Path | None = None,
    seed: int = 0,
    continue_saving: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    samples: bool = True,
) -> Path | None:
    """Prune `module.path` and write a run folder; a run that was killed goes on from its last finished step.

    Returns:
        The run folder, or None on processes other than the first.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    main = rank == 0
    check_launcher(trainer.strategy)
    evaluation = evaluation or EvaluationText()
    name, method_class = find(method)
    config = models.load_config(module.path).get_text_config(decoder=True)
    # for weights in fp32; on an accelerator `auto` is known with the model
    mixed = models.resolve_dtype(module.dtype_name, accelerated=False) == torch.float32 and (
        str(trainer.precision) == "bf16-mixed"
    )
    shapes = Decoder(models.on_meta(config))
    last = affordable(shapes.geometry, module.offload != "none")
    asked = refit or Refit("none")
    refit = asked.resolved(name, family_of(config), last)
    _check_idle(asked, refit)
    options = _selecting(dict(options), refit)
    chosen = method_class(**options)
    target = target_depth(config.num_hidden_layers, target_layers, sparsity)
    chosen.check(family_of(config), config.num_hidden_layers, config.num_hidden_layers - target)
    if getattr(chosen, "compensate", "none") == "magnitude":
        check_scalable(shapes)
    on_the_way = set(evaluation.at) if chosen.progressive and not refit.ends else set()
    tokenizer = models.load_tokenizer(module.path)
    bos = models.needs_bos(config, tokenizer)
    windows = data.attach(tokenizer, bos=bos, seed=seed)
    texts = evaluation_windows(evaluation, tokenizer, bos, data.seqlen) if main else {}
    check_readable([windows, *texts.values()], config, module.path)
    identity = {
        "model": {
            "path": module.path,
            "dtype": module.dtype_name,
            **({"precision": "bf16-mixed"} if mixed else {}),
            **({"compile": True} if module.compile_layers else {}),
        },
        "method": {"name": name, **options},
        **({"refit": refit.settings} if refit.on else {}),
        "target_layers": target,
        "data": {"source": windows.source, "tokens": windows.tokens, "fingerprint": windows.fingerprint},
        "monitor": module.monitor_windows,
        **({"batches": dealt} if (dealt := chosen.dealt(data.batch_size * trainer.world_size)) else {}),
        "seed": seed,
    }
    output = output or ROOT / f"{_slug(module.path)}-{name}-{target}-{digest(identity)}"
    if resume and not (output / RUN_FILE).is_file():
        raise RunError(f"--resume: {str(output)!r} holds no run to go on with; run without --resume")
    reads = [("--model.path", module.path), ("--data.calibration", data.calibration)]
    reads += [("--evaluation.data", text) for text in evaluation.data]
    if evaluation.dense_from is not None:
        read_run(Path(evaluation.dense_from).expanduser())
        reads.append(("--evaluation.dense_from", evaluation.dense_from))
    run = Run(output, identity, overwrite=overwrite, main=main, reads=reads)
    if run.finished:
        print(f"{output} is finished already; --overwrite runs it again")
        if others := [name for name in texts if name not in run.info.get("perplexity", {})]:
            print(f"not measured on {', '.join(others)}: come-eval {output} --texts {' '.join(others)} does that")
        print(summary(run.info))
        return output
    with run:
        meter = Meter()
        scratch = output / SCRATCH / str(rank)
        device = trainer.strategy.root_device
        accelerated = device.type != "cpu"
        model = models.load_model(module.path, module.dtype_name, module.offload, scratch / "weights", accelerated)
        loading = meter.seconds
        layers = config.num_hidden_layers
        between = range(target + 1, layers)
        saves = set(evaluation.at or between).intersection(between) if continue_saving else set()
        needed = _bytes_needed(module, Decoder(model), chosen, refit, target, windows.input_ids.numel())
        check_space(output, (needed + 1.1 * _bytes(model) * (1 + len(saves))) / 2**30)

        record_file = output / "record.jsonl"
        begun = run.resumed and record_file.is_file()
        record = Record.read(record_file, layers) if begun else Record(layers, record_file)
        fingerprint = models.fingerprint(model)
        if run.resumed and run.info.get("model", {}).get("fingerprint", fingerprint) != fingerprint:
            raise RunError(
                f"the weights of {module.path!r} are not those that the run in {str(output)!r} began with; give "
                "another --output, or --overwrite to replace it"
            )
        module.products = torch.bfloat16 if mixed and model.dtype == torch.float32 else None
        if main:
            if continue_saving and refit.ends:
                print("--continue_saving: repairs come at the end; models of depths on the way are saved without them")
            why = "repairs come at the end" if refit.ends else f"{name} plans for the last depth"
            _tell_skipped(set(evaluation.at) - on_the_way.intersection(between) - {target}, between, why)
            if run.resumed and record.steps:
                print(f"going on from step {len(record.steps)}: {record.layers} of {layers} layers left")
            run.update(
                model={
                    "path": module.path,
                    "fingerprint": fingerprint,
                    "layers": layers,
                    "parameters": models.parameter_count(model),
                    "dtype": str(model.dtype).removeprefix("torch."),
                    **({"precision": "bf16-mixed"} if module.products else {}),
                },
                method={"name": name, **options},
                refit=refit.settings,
                data={
                    "source": windows.source,
                    "tokens": windows.tokens,
                    "windows": len(windows),
                    "seqlen": data.seqlen,
                    "fingerprint": windows.fingerprint,
                },
                target_layers=target,
                seed=seed,
            )
            _measure_dense(run, model, texts, evaluation, device, loading)
        module.attach(model, record, needs=chosen.needs, span=chosen.span, scratch=scratch / "streams")

        def save(folder: Path, pruned: dict[str, Any] | None) -> None:
            card = pruned_card(run.info | {"perplexity": pruned or {}}, record)
            models.save_model(module.student_model, folder, tokenizer, card, licence_files(module.path))

        def after_step(_: PruningModule) -> None:
            run.settle()
            folder = output / f"model-{record.layers}"
            if record.layers in saves and not folder.exists():
                save(folder, None)
            depths = run.info.get("depths", {})
            if record.layers in on_the_way and record.layers > target and str(record.layers) not in depths:
                found = measure(module.student_model, texts, "pruned", run.info["perplexity"])
                run.update(depths=depths | {str(record.layers): {"perplexity": found} | costs(record)})

        if record.layers > target:
            if main and record.steps:
                after_step(module)  # if it was killed between a step and its model
            _fit(trainer, module, data, ProgressivePruning(chosen, target, after_step, refit), output)
        if not main:
            return None
        if record.layers > target:
            print(
                f"stopped at {record.layers} layers, before the target of {target}; the same command goes on from here"
            )
            return output
        cost = costs(record)
        measured = measure(move(module.student_model, device), texts, "pruned", run.info["perplexity"])
        seconds = run.info.get("seconds", {}) | {"prune": cost["seconds"]}
        move(module.student_model, "cpu")
        save(output / "model", measured)
        parameters = {
            "dense": run.info["model"]["parameters"],
            "pruned": models.parameter_count(module.student_model),
            "layer": Decoder(model).layer_parameters,
        }
        run.update(
            perplexity=measured,
            seconds=seconds,
            peak_gib=cost["peak_gib"],
            parameters=parameters,
            devices=trainer.world_size,
            groups=record.groups,
            scales=record.scales,
        )
        run.update(status="finished")
        if samples and module.offload == "disk":
            samples = False  # a word would read the whole model
            print(
                f"no continuations with --offload disk; `come-report {output} --samples` makes them, with models "
                "in memory"
            )
        loaders = {"dense": lambda: move(model, device), "pruned": lambda: move(module.student_model, device)}
        finish(output, partial(ask, output, loaders, tokenizer) if samples else None)
        run.close(ROOT, SCRATCH)
        print(summary(run.info))
        print(f"written to {output}")
        return output


def _bytes(model: Any) -> int:
    """Of a model's weights."""
    return models.parameter_count(model) * next(model.parameters()).element_size()


def _bytes_needed(
    module: PruningModule, dense: Decoder, chosen: Method, refit: Refit, target: int, tokens: int
) -> float:
    """Of disk, at most, for what steps write and for what is not kept in memory; models that are saved come on top."""
    size, layers = next(dense.model.parameters()).element_size(), len(dense)
    needed: float = size * dense.layer_parameters * _written(chosen, refit, layers, target)
    if module.offload == "disk" or retires(chosen, refit):  # new layers, or dense ones: at most all
        needed += _bytes(dense.model)
    if module.cache != "none":  # streams of the dense model and of the pruned one
        streams = 2 * size * tokens * dense.geometry.hidden * (layers + 1)
        needed += max(0.0, streams - module.cache_gib * 2**30)
    return needed


def _tell_skipped(skipped: set[int], between: range, why: str) -> None:
    """Which depths of --evaluation.at are not measured. `why`: for those that are on the way."""
    if skipped:
        if not skipped.intersection(between):
            why = f"depths on the way are {between.start} to {between.stop - 1}"
        print(f"--evaluation.at: {', '.join(map(str, sorted(skipped)))} not measured: {why}")


def _measure_dense(
    run: Run,
    model: Any,
    texts: Mapping[str, TokenWindows],
    evaluation: EvaluationText,
    device: torch.device,
    loading: float,
) -> None:
    """The dense model's perplexity, as far as the run or another that measured it does not know it; `loading`: seconds
    that the model took."""
    meter, before = Meter(device), run.info.get("perplexity")
    if before is None and evaluation.dense_from is not None:
        before = dense_of(evaluation.dense_from, run.info["model"])
    known = measure(model, texts, "dense", before, device)
    if known != run.info.get("perplexity"):  # the first time, or another text than before it was cut off
        seconds = {"load": round(loading, 2), "dense_perplexity": round(meter.seconds, 2)}
        run.info.pop("depths", None)
        run.update(perplexity=known, seconds=seconds)


def _fit(
    trainer: Trainer, module: PruningModule, data: CalibrationData, pruning: ProgressivePruning, output: Path
) -> None:
    """The loop, from the step after the last one of the module's record."""
    if not trainer.loggers:
        trainer.loggers = default_loggers(output)
    for step in module.record.steps:  # the CSV logger begins a new file
        log_step(trainer, step)
    callbacks = [*trainer.callbacks, pruning]  # type: ignore[attr-defined]
    trainer.callbacks = [PruningBar() if isinstance(c, ProgressBar) else c for c in callbacks]  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data)


def costs(record: Record) -> dict[str, float]:
    """Seconds and peak GiB of the steps so far."""
    return {
        "seconds": round(sum(s.seconds for s in record.steps), 2),
        "peak_gib": round(max(s.peak_gib for s in record.steps), 3),
    }


def _check_idle(asked: Refit, refit: Refit) -> None:
    """Raises ValueError: settings of a repair that does not come."""
    unset = Refit().settings
    for name, given in asked.settings.items():
        left_out = given in (unset[name], 0, "own")  # a part that is asked to be left out is left out
        if not refit.on and name not in ("parts", "sweep") and not left_out:
            raise ValueError(
                f"refit.{name} {given}: nothing is repaired here (--refit {asked.parts}); give --refit down, both or "
                "all, or leave it out"
            )


def _written(chosen: Method, refit: Refit, layers: int, target: int) -> int:
    """Layers, at most, whose weights the steps keep in files of their own."""
    each = chosen.writes + int(refit.on and refit.when == "step")
    return each * (layers - target) + (target if refit.ends else 0)


def _selecting(options: dict[str, Any], refit: Refit) -> dict[str, Any]:
    """The options with `bridge` without a number spelt out. Raises ValueError: a choice by refitted layers without
    refits."""
    if "bridge" in options and options["bridge"] is None:
        options["bridge"] = BRIDGE if refit.on else 0
    select = options.get("select", "span")
    if select != "span" and not refit.on:
        raise ValueError(f"select {select} compares refitted layers: give --refit down, both or all")
    return options


def default_loggers(folder: Path) -> list[Logger]:
    """CSV always, TensorBoard where it is installed; both under `folder/logs`."""
    loggers: list[Logger] = [CSVLogger(folder, name="logs", version="")]
    if find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(folder, name="logs", version="", log_graph=False, default_hp_metric=False))
    return loggers


def _slug(path: str) -> str:
    name = {"embedded": "smollm2-135m-instruct", models.EMBEDDED: "smollm2-135m-instruct"}.get(path)
    name = name or Path(path).name.removesuffix(".gguf").lower() or "model"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def summary(info: Mapping[str, Any]) -> str:
    """What a run did, in a few lines for the terminal."""
    parameters = info["parameters"]
    removed = 1 - parameters["pruned"] / parameters["dense"]
    layers: Sequence[Any] = info["groups"]
    lines = [
        f"layers      {info['model']['layers']} → {len(layers)}",
        f"parameters  {amount(parameters['dense'])} → {amount(parameters['pruned'])} (−{removed:.0%})",
    ]
    for name, entry in info["perplexity"].items():
        lines.append(
            f"perplexity  {number(entry['dense'])} → {number(entry['pruned'])} "
            f"({number(entry['pruned'] / entry['dense'])}×) on {entry['tokens']} held-out tokens of {Path(name).name}"
        )
    lines.append(f"pruning     {info['seconds']['prune']:.0f} s, peak memory {info['peak_gib']:.2f} GiB")
    return "\n".join(lines)
