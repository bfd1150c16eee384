"""What both command lines share: names of flags, warnings that say nothing, errors as one line."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


def normalise(
    argv: Sequence[str], aliases: Mapping[str, str], switches: Collection[str], lists: Collection[str] = ()
) -> list[str]:
    """Command-line arguments as the parser knows them: hyphen or underscore alike, official names, bare switches,
    several values of a list; `--config` first, so that what is said beside it counts, in whatever order."""
    result: list[str] = []
    pending = list(argv)
    while pending:
        word = pending.pop(0)
        word = "--config" if word == "-c" else word
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        name = aliases.get(name, name)
        values = [value] if equals else []
        while not equals and pending and not pending[0].startswith("--") and (not values or name in lists):
            if name in switches and pending[0].lower() not in ("true", "false", "yes", "no"):
                break  # a word of its own, as the model that is measured
            values.append(pending.pop(0))
        if name in switches and not values:
            values = ["true"]
        if name in lists and values and not values[0].startswith("["):
            values = [json.dumps(values, ensure_ascii=False)]  # which YAML reads, whatever is in them
        result += [f"{name}={values[0]}"] if values else [name]
    return sorted(result, key=lambda word: not word.startswith("--config="))


def read_config(file: str) -> dict[str, Any]:
    """What a `--config` file says. Raises ValueError: no such file, or no mapping of options."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}; expected a YAML file of options") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"--config {file}: not YAML{where}; expected options as NAME: VALUE") from None
    if not isinstance(content, dict):
        what = {type(None): "nothing", list: "a list", str: "text"}.get(type(content), "a value")
        raise ValueError(f"--config {file}: the file holds {what}; expected options as NAME: VALUE")
    return content


def configs(argv: Sequence[str]) -> list[dict[str, Any]]:
    """What the `--config` files on the command line say. Raises ValueError as `read_config`."""
    return [read_config(word.partition("=")[2]) for word in argv if word.startswith("--config=")]


def scan(argv: Sequence[str], group: str, default: str) -> str:
    """The value of `--GROUP.name` or `--GROUP`, from the flags or else the last `--config` file that has one.

    Raises:
        ValueError: as `read_config`.
    """
    found = default
    for content in configs(argv):
        entry = content.get(group)
        entry = entry.get("name") if isinstance(entry, dict) else entry
        found = found if entry is None else str(entry)
    for word in argv:
        if word.startswith((f"--{group}.name=", f"--{group}=")):
            found = word.partition("=")[2]
    return found


def check_seed(seed: int) -> None:
    """Raises ValueError: a seed that a random generator does not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: expected a whole number from 0 to {2**32 - 1}")


def with_doubles(accelerator: str) -> str:
    """The accelerator that is meant: Apple's is not taken by itself, as it has no fp64, in which sums are kept.

    Raises:
        ValueError: it is asked for.
    """
    import torch

    apple = torch.backends.mps.is_available()
    if accelerator == "mps" or accelerator == "gpu" and apple and not torch.cuda.is_available():
        raise ValueError(
            f"accelerator {accelerator}: sums are kept in fp64, which MPS lacks; give --trainer.accelerator cpu"
        )
    return "cpu" if accelerator == "auto" and apple else accelerator


def with_half(precision: str | int | None, accelerator: str) -> str:
    """Lightning's precision that is meant: without one, bf16-mixed where the device multiplies bfloat16 natively. It is
    for weights in fp32; others are computed with as they are.

    Raises:
        ValueError: one that makes other weights of the model, for which there is --model.dtype, or that overflows.
    """
    import torch

    if precision is None:
        if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = accelerator in ("auto", "cpu") and multiplies_bfloat16()
        return "bf16-mixed" if native else "32-true"
    found = {"bf16": "bf16-mixed", "32": "32-true"}.get(str(precision), str(precision))
    if found not in ("bf16-mixed", "32-true"):
        raise ValueError(
            f"--trainer.precision {precision}: expected 32-true, or bf16-mixed, where products of fp32 weights are "
            "computed in bfloat16; weights in half precision are --model.dtype bfloat16"
        )
    return found


def multiplies_bfloat16() -> bool:
    """Whether this processor does, and torch uses it (ATEN_CPU_CAPABILITY tells it not to)."""
    import torch

    widest = torch.backends.cpu.get_cpu_capability() == "AVX512"
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu; not in every version
    return widest and any(getattr(torch.cpu, name, bool)() for name in asked)


def add_run_arguments(parser: Any) -> None:
    """The options of every command that writes a run folder."""
    parser.add_argument("--seed", type=int, default=0, help="Seed of everything random.")
    parser.add_argument(
        "--resume",
        type=bool,
        default=False,
        help="Insist on going on with a run that was cut off (the same command does so by itself).",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run in the output folder.")
    parser.add_argument(
        "--samples", type=bool, default=True, help="Let the models continue a few words at the end, for the report."
    )


def call(function: Callable[..., Any], argv: Sequence[str], *, prog: str, usage: str, description: str, **given: Any):
    """Calls a typed function with its arguments read from the command line; what is in `given` is not read there.

    Raises:
        jsonargparse.ArgumentError: an argument that the function does not have, or not of its type.
    """
    from come_pl.cli.parser import Parser

    configs(argv)
    parser = Parser(prog=prog, usage=usage, description=description)
    parser.add_argument("--config", action="config", help="YAML file with some of the options.")
    parser.add_function_arguments(function, as_positional=True, skip=set(given))
    config = parser.instantiate_classes(parser.parse_args(list(argv)))
    if "seed" in config:
        check_seed(config.seed)
    return function(**{k: v for k, v in config.items() if k != "config"}, **given)


def quiet() -> None:
    """Silence what says nothing about the run; what a terminal has no letters for must not end one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for message in (
        ".*does not have many workers.*",
        ".*configure_optimizers. returned .None.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Experiment logs directory.*exists and is not empty.*",
        ".*torch.inference_mode.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*in eval mode at the start of training.*",
        ".*a sampler that is not.*DistributedSampler.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    import logging

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available():  # DeepSpeed, where it is installed, warns that it had to find this out
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    import lightning.fabric.utilities.warnings  # noqa: F401  # sets its own format

    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"


def guarded(main: Callable[[], None], goes_on_from: str = "") -> None:
    """Turns what a user can mend into one line and exit code 2, and Ctrl-C into one line and exit code 130.

    Args:
        goes_on_from: What the same command goes on from after Ctrl-C, if it does.
    """
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from come_pl.errors import first_line
    from come_pl.models import ModelError
    from come_pl.runs import RunError

    try:
        main()
    except KeyboardInterrupt:
        _stop(goes_on_from)
    except SIGTERMException:  # a SystemExit without a code, as if all had gone well
        _stop(goes_on_from, 143)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's trainer makes this of it
            _stop(goes_on_from)
        raise
    except MisconfigurationException as error:
        _fail(first_line(error))
    except (ModelError, RunError, ArgumentError) as error:
        _fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.strerror}: {error.filename or 'while writing'}; free space or give another --output")
    except (ValueError, TypeError) as error:
        if not _about_settings(error):
            raise
        _fail(" ".join(str(error).split()))


def _about_settings(error: ValueError | TypeError) -> bool:
    """Whether an error was raised by a line of this package, or by Lightning reading the trainer's settings; what
    comes from deeper inside a library is a defect and keeps its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    own = ("come_pl",) if isinstance(error, ValueError) else ()
    return module.startswith((*own, "lightning.pytorch.trainer", "lightning.fabric.accelerators"))


def _stop(goes_on_from: str, code: int = 130) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        again = "the same command" + " without --overwrite" * any(w.startswith("--overwrite") for w in sys.argv)
        print("stopped" + f"; {again} goes on from {goes_on_from}" * bool(goes_on_from), file=sys.stderr)
    raise SystemExit(code)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
