"""`python -m come_pl.compare`: the console script `come-compare`."""

from come_pl.cli.compare import compare_main

if __name__ == "__main__":
    compare_main()
