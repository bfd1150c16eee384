"""Command line of `come-latency`."""

from __future__ import annotations

import sys

from come_pl.cli.common import call, guarded, normalise, quiet

LISTS = {"--batch", "--prompt"}


def latency_main() -> None:
    """Console script `come-latency`."""
    guarded(_latency)


def _latency() -> None:
    quiet()
    from come_pl.workflows.latency import latency

    call(
        latency,
        normalise(sys.argv[1:], {}, {"--compile"}, LISTS),
        prog="come-latency",
        usage="come-latency MODEL [--dense MODEL] [--batch N …] [--prompt N …] [--new_tokens N] [options]; see --help",
        description="Prompt processing and token generation of a run folder or checkpoint, next to its dense model.",
    )


if __name__ == "__main__":
    latency_main()
