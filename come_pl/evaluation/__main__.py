"""`python -m come_pl.evaluation`: the console script `come-eval`."""

from come_pl.cli.evaluate import evaluate_main

if __name__ == "__main__":
    evaluate_main()
