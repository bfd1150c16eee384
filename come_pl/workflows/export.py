"""Other formats of a saved model, made by the tools that own them."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from come_pl.models import locate
from come_pl.record import write_atomically
from come_pl.runs import RunError
from come_pl.workflows.subject import read_subject

CONVERTER = "convert_hf_to_gguf.py"
FULL_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}  # layers of full attention, as llama.cpp has them built in


def export(
    model: str,
    format: Literal["gguf"] = "gguf",
    converter: Path | None = None,
    output: Path | None = None,
    outtype: Literal["f32", "f16", "bf16", "q8_0", "auto"] = "f16",
) -> Path | None:
    """Convert a saved model to GGUF with llama.cpp's converter; where there is none, print the command that does.

    Args:
        model: A run folder, or a folder with a checkpoint.
        format: Format of the file.
        converter: llama.cpp's convert_hf_to_gguf.py; by default that on the PATH, or the one Python can import.
        output: File to write; RUN/model-OUTTYPE.gguf by default, or beside a plain checkpoint.
        outtype: Number format of the weights.

    Returns:
        The file, or None if no converter was found.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    if converter is not None and not converter.is_file():
        raise RunError(f"converter {str(converter)!r} does not exist; expected llama.cpp's {CONVERTER}")
    subject, where = read_subject(model), locate(model)
    folder = Path(where.path)
    if where.gguf_file or not folder.is_dir():
        raise RunError(f"model {model!r}: expected a run folder or a folder with a checkpoint to convert")
    _check_pattern(folder)
    file = output or (subject.run or folder) / f"model-{outtype}.{format}"
    found = converter or _installed()
    command = [sys.executable, str(found or CONVERTER), str(folder), "--outfile", str(file), "--outtype", outtype]
    if found is None:
        command[0] = "python"
        print(f"{CONVERTER} is not installed here; with llama.cpp's repository at hand:\n{shlex.join(command)}")
        return None
    print(shlex.join(command), flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    at = command.index("--outfile") + 1

    def convert(partial: Path) -> None:
        partial.unlink(missing_ok=True)  # what a kill left
        given = [*command[:at], str(partial), *command[at + 1 :]]
        done = subprocess.run(given, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode or not partial.is_file():
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            why = next(iter(done.stderr.strip().splitlines()[-1:] or lines[-1:]), "it wrote no file")
            raise RunError(f"{found} failed with exit code {done.returncode}: {why}")

    write_atomically(file, convert)
    print(f"written to {file}, {file.stat().st_size / 2**20:,.1f} MiB")
    return file


def _check_pattern(folder: Path) -> None:
    """Raises RunError: layers attend in another order than llama.cpp takes for granted, and a file cannot say so."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    every = FULL_EVERY.get(config.get("model_type", ""))
    types = config.get("layer_types") or (config.get("text_config") or {}).get("layer_types")
    if every is None or not types:
        return
    full = [index for index, kind in enumerate(types) if kind == "full_attention"]
    if full != list(range(every - 1, len(types), every)):
        raise RunError(
            f"{folder} cannot become GGUF: llama.cpp takes every {every}th layer of a {config['model_type']} for one "
            f"of full attention, and in this model these are layers {full}; transformers and vLLM go by its config"
        )


def _installed() -> Path | None:
    """The converter on the PATH, or as a Python module."""
    on_path = shutil.which(CONVERTER) or shutil.which(CONVERTER.replace("_", "-"))
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec(CONVERTER.removesuffix(".py"))
    return Path(spec.origin) if spec and spec.origin else None
