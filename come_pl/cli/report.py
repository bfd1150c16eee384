"""Command line of `come-report`."""

from __future__ import annotations

import json
import sys

from come_pl.cli.common import call, guarded, normalise, quiet

LISTS = {"--prompts"}


def report_main() -> None:
    """Console script `come-report`."""
    guarded(_report)


def _report() -> None:
    quiet()
    from come_pl.workflows.report import report

    words = normalise(sys.argv[1:], {}, {"--samples"}, LISTS)
    runs = [word for word in words if not word.startswith("-")]
    call(
        report,
        [*([json.dumps(runs)] if runs else []), *(word for word in words if word.startswith("-"))],
        prog="come-report",
        usage="come-report RUN [RUN …] [--output FOLDER] [--samples] [options]; see --help",
        description="One self-contained page about pruning runs, trainings and comparisons.",
    )


if __name__ == "__main__":
    report_main()
