"""Make a language model shallower: `python prune.py --help`."""

from come_pl.cli.prune import prune_main

if __name__ == "__main__":
    prune_main()
