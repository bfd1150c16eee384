"""Distil a pruned language model from its dense teacher: `python train.py --help`."""

from come_pl.cli.train import train_main

if __name__ == "__main__":
    train_main()
