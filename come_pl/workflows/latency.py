"""Latency of a model next to its dense one, over batches and prompt lengths."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from come_pl.evaluation.latency import LatencyError, Load, ideal, speed_up, summary, take_turns
from come_pl.record import versions, write_atomically
from come_pl.report.style import number
from come_pl.workflows.subject import check_output, described, device_of, load_pair, read_pair, read_subject
from come_pl.workflows.tables import markdown, write_json

ROOT = Path("runs/latency")


def latency(
    model: str,
    dense: str | None = None,
    batch: list[int] | None = None,
    prompt: list[int] | None = None,
    new_tokens: int = 64,
    repeats: int = 7,
    warmup: int = 2,
    compile: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure prompt processing and generation of a model and its dense one in turns, and write `latency.json` and
    `latency.md`, in its run folder if it has one.

    Args:
        model: A run folder, a folder with a checkpoint, a .gguf file or a hub id.
        dense: The dense model; for a run folder the one that it began with. `none` measures the model alone.
        batch: Sequences at once, one or several numbers; 1 by default.
        prompt: Tokens of each prompt, one or several numbers; 512 by default.
        new_tokens: Tokens generated after the prompt.
        repeats: Turns that count.
        warmup: Turns before, which do not count.
        compile: Use torch.compile.
        dtype: auto (float32 on a CPU, elsewhere the checkpoint's own, of the dense model if there is one), float32,
            bfloat16 or float16.
        device: auto, cpu or cuda.
        seed: Seed of the prompts' random tokens.
        output: JSON file; the Markdown is beside it. RUN/latency.json by default, or runs/latency/ for a checkpoint.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    loads = [Load(size, length, new_tokens) for size in batch or [1] for length in prompt or [512]]
    where = device_of(device)
    if dense is None and read_subject(model).run:
        dense = "auto"
    subject, reference = read_pair(model, None if dense == "none" else dense)
    file = output or subject.output(ROOT, "latency")
    check_output(file)
    loaded = load_pair(subject, reference, dtype, where)
    heads = {m.get_output_embeddings().weight.shape[0] for m in loaded.values()}
    if reference is not None and len(heads) > 1:
        raise LatencyError(
            f"--dense {reference.path!r} and {subject.path!r} have different vocabularies "
            f"({' and '.join(map(str, sorted(heads)))} tokens); expected the model that it was made from"
        )
    paths = {"model": subject.path, "dense": reference.path if reference else ""}
    info: dict[str, Any] = {
        **{which: described(paths[which], measured) for which, measured in loaded.items()},
        "settings": {"repeats": repeats, "warmup": warmup, "compile": compile, "seed": seed},
        "machine": {
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else platform.machine() or "cpu",
            "threads": torch.get_num_threads() if where.type == "cpu" else None,
        },
        "command": " ".join(["come-latency", *sys.argv[1:]]),
        "versions": versions(),
        "results": [],
    }
    if "dense" in loaded:
        info["ideal"] = ideal(loaded["dense"], loaded["model"])
    for load in loads:

        def say(what: str, load: Load = load) -> None:
            print(f"batch {load.batch}, prompt {load.prompt}, {load.new_tokens} new tokens: {what}", flush=True)

        turns = take_turns(loaded, load, repeats=repeats, warmup=warmup, compiled=compile, seed=seed, progress=say)
        result: dict[str, Any] = dict(vars(load))
        result |= {which: summary(found, load) for which, found in turns.items()}
        if "dense" in turns:
            result["speed_up"] = speed_up(turns["dense"], turns["model"])
        info["results"].append(result)
        write_json(file, info)
        write_atomically(file.with_suffix(".md"), report(info))
    print(report(info))
    print(f"written to {file}")
    return info


def report(info: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    settings, machine, both = info["settings"], info["machine"], "dense" in info
    model = info["model"]
    lines = [f"# {model['path']}: latency\n"]
    for which in ("dense", "model"):
        if which in info:
            one = info[which]
            lines.append(f"- {which}: {one['path']}, {one['layers']} layers, {one['parameters'] / 1e6:.1f}M parameters")
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    lines.append(
        f"- {machine['device']}{threads}, {model['dtype']}, {'compiled' if settings['compile'] else 'not compiled'}; "
        f"medians [quartiles] of {settings['repeats']} turns after {settings['warmup']} to warm up\n"
    )
    columns = ["batch", "prompt", "new tokens", "model", "prompt ms", "prompt tokens/s", "ms a new token"]
    columns += ["new tokens/s", "peak GiB"]
    rows = []
    for result in info["results"]:
        load = [result["batch"], result["prompt"], result["new_tokens"]]
        for which in ("dense", "model"):
            if which in result:
                one = result[which]
                row = [*load, which, _ms(one["prompt_seconds"]), number(one["prompt_tokens_per_second"])]
                row += [_ms(one["generation_seconds"], load[2]), number(one["generation_tokens_per_second"])]
                rows.append([*row, f"{one['peak_gib']:.3f}"])
    lines.append(markdown(columns, rows))
    if both:
        best = info["ideal"]
        columns = ["batch", "prompt", "new tokens", "prompt speed-up", "generation speed-up", "ideal L/L'", "with head"]
        rows = []
        for result in info["results"]:
            gains = [_times(result["speed_up"][part]) for part in ("prompt", "generation")]
            load = [result["batch"], result["prompt"], result["new_tokens"]]
            rows.append([*load, *gains, f"{best['layers']:.2f}×", f"{best['with_head']:.2f}×"])
        lines.append(markdown(columns, rows))
        lines.append(
            f"Decoder layers hold {best['layers_share']:.0%} of the dense model's parameters that every new "
            "token is multiplied with; the output head holds the others and stays.\n"
        )
    return "\n".join(lines)


def _ms(seconds: Mapping[str, float], parts: int = 1) -> str:
    middle, low, high = (number(1000 * seconds[key] / parts) for key in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]"


def _times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}]"
