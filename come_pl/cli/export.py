"""Command line of `come-export`."""

from __future__ import annotations

import sys

from come_pl.cli.common import call, guarded, normalise, quiet


def export_main() -> None:
    """Console script `come-export`."""
    guarded(_export)


def _export() -> None:
    quiet()
    from come_pl.workflows.export import export

    call(
        export,
        normalise(sys.argv[1:], {}, ()),
        prog="come-export",
        usage="come-export MODEL [--format gguf] [--converter FILE] [--outtype TYPE] [--output FILE]; see --help",
        description="A run folder or checkpoint as a GGUF file, by llama.cpp's own converter.",
    )


if __name__ == "__main__":
    export_main()
