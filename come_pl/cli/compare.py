"""Command line of `come-compare`."""

from __future__ import annotations

import signal
import sys

from come_pl.cli import prune as prune_cli
from come_pl.cli.common import call, configs, guarded, normalise, quiet

SWITCHES = {"--keep_models", "--overwrite"}
LISTS = {"--methods", "--depths", "--evaluation", "--tasks"}
SET_HERE = {  # what must be the same for every run, by the name that this command has for it
    "--method.name": "--methods",
    "--target_layers": "--depths",
    "--sparsity": "--depths",
    "--model.path": "--model",
    "--data.calibration": "--calibration",
    "--data.tokens": "--tokens",
    "--data.nsamples": "--tokens",
    "--data.seqlen": "--seqlen",
    "--evaluation.data": "--evaluation",
    "--evaluation.tokens": "--evaluation_tokens",
    "--seed": "--seed",
    "--output": "--output",
    "--overwrite": "--overwrite",
    "--continue_saving": "--keep_models",
}


def compare_main() -> None:
    """Console script `come-compare`, and `python -m come_pl.compare`."""
    guarded(_compare, "the last finished step")


def _compare() -> None:
    quiet()
    from come_pl.cli.parser import nested
    from come_pl.runs import flat
    from come_pl.workflows.compare import compare

    own, passed = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, passed = own[:at], own[at + 1 :]
    passed = normalise(passed, prune_cli.ALIASES, prune_cli.SWITCHES, prune_cli.LISTS)
    for word in passed:
        name = word.partition("=")[0]
        if name in SET_HERE:
            raise ValueError(f"{word!r} after '--': every run gets the same; say {SET_HERE[name]} before the '--'")
    for content in configs(passed):
        said = {f"--{key}" for key in flat(nested(content, prune_cli.ALIASES))}
        for name in sorted(said & SET_HERE.keys()):
            raise ValueError(f"{name} in a --config after '--': every run gets the same; say {SET_HERE[name]} here")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: the run under way ends with this command
    done = call(
        compare,
        normalise(own, {}, SWITCHES, LISTS),
        prog="come-compare",
        usage="come-compare [--methods NAME[:OPTION=VALUE,…] …] [--depths N …] [options] [-- options of prune.py]",
        description="Every pruning method on one model with the same tokens: one table, one plot. Options after '--' "
        "go to each run of prune.py as they are (-- --model.dtype bfloat16).",
        passed=passed,
    )
    if any(row["status"] != "finished" or row.get("error") for row in done):
        raise SystemExit(1)
