"""Command line of `come-eval`."""

from __future__ import annotations

import sys

from come_pl.cli.common import call, guarded, normalise, quiet

LISTS = {"--texts", "--tasks"}


def evaluate_main() -> None:
    """Console script `come-eval`, and `python -m come_pl.evaluation`."""
    guarded(_evaluate)


def _evaluate() -> None:
    quiet()
    from come_pl.workflows.evaluate import evaluate

    done = call(
        evaluate,
        normalise(sys.argv[1:], {}, {"--refresh"}, LISTS),
        prog="come-eval",
        usage="come-eval MODEL [--dense MODEL] [--texts TEXT …] [--tasks NAME[=SHOTS] …] [options]; see --help",
        description="Perplexity and multiple-choice tasks of a run folder or checkpoint, next to its dense model.",
    )
    if done["failed"]:
        raise SystemExit(1)
