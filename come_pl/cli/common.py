"""What both command lines share: names of flags, warnings that say nothing, errors as one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def normalise(
    argv: Sequence[str], aliases: Mapping[str, str], switches: Collection[str], lists: Collection[str] = ()
) -> list[str]:
    """Command-line arguments as the parser knows them: hyphen or underscore alike, official names, bare switches,
    several values of a list."""
    result: list[str] = []
    pending = list(argv)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        name = aliases.get(name, name)
        values = [value] if equals else []
        while not equals and pending and not pending[0].startswith("--") and (not values or name in lists):
            values.append(pending.pop(0))
        if name in switches and not values:
            values = ["true"]
        if name in lists and values and not values[0].startswith("["):
            values = ["[" + ", ".join(repr(v) for v in values) + "]"]
        result += [f"{name}={values[0]}"] if values else [name]
    return result


def scan(argv: Sequence[str], group: str, default: str) -> str:
    """The value of `--GROUP.name`, from the flags or else the last `--config` file that has one."""
    import yaml

    found = default
    for word in argv:
        if word.startswith("--config="):
            try:
                content = yaml.safe_load(Path(word.partition("=")[2]).read_text()) or {}
            except (OSError, yaml.YAMLError):
                continue  # the parser says what is wrong with it
            entry = content.get(group, {})
            found = entry.get("name", found) if isinstance(entry, dict) else entry
    for word in argv:
        if word.startswith(f"--{group}.name="):
            found = word.partition("=")[2]
    return found


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
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, usage=usage, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with some of the options.")
    parser.add_function_arguments(function, as_positional=True, skip=set(given))
    config = parser.instantiate_classes(parser.parse_args(list(argv)))
    return function(**{k: v for k, v in config.items() if k != "config"}, **given)


def quiet() -> None:
    """Silence what says nothing about the run."""
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


def guarded(main: Callable[[], None]) -> None:
    """Turns what a user can mend into one line and exit code 2."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from come_pl.models import ModelError
    from come_pl.runs import RunError

    try:
        main()
    except MisconfigurationException as error:
        _fail(str(error).splitlines()[0])
    except (ModelError, RunError, ArgumentError) as error:
        _fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.strerror}: {error.filename or 'while writing'}; free space or give another --output")
    except ValueError as error:
        if not _about_settings(error):
            raise
        _fail(str(error))


def _about_settings(error: ValueError) -> bool:
    """Whether an error was raised by a line of this package, or by Lightning reading the trainer's settings; what
    comes from deeper inside a library is a defect and keeps its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.startswith(("come_pl", "lightning.pytorch.trainer"))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
