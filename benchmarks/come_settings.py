"""CoMe's settings on the demo model, one at a time: held-out perplexity, seconds and peak memory of each.

    python -m benchmarks.come_settings --calibration FILE --evaluation FILE

Writes benchmarks/results/come_settings.csv as it goes; rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import gc
import logging
from pathlib import Path

import torch

from benchmarks.measure import peak_gib, prune
from come_pl import models
from come_pl.cli.common import quiet
from come_pl.data import CalibrationData, token_windows
from come_pl.evaluation.perplexity import perplexity
from come_pl.pruning.methods import find
from come_pl.record import Meter

RELEASED = {"norm": "mean", "p": 1.0, "rho": 0.0, "wo_repeat": True, "span_tokens": "last"}
ROWS: list[tuple[str, dict, int, int]] = [  # method, options over RELEASED, tokens, seed
    ("come", {}, 19456, 0),
    ("come", {"wo_repeat": False}, 19456, 0),
    ("come", {"rho": 0.9}, 19456, 0),
    ("come", {"rho": 0.97, "wo_repeat": False}, 19456, 0),
    ("come", {"norm": "fold"}, 19456, 0),
    ("come", {}, 4096, 0),
    ("come", {"rho": 0.5}, 19456, 0),
    ("come", {"span_tokens": "all"}, 4096, 0),
    ("come", {"span_tokens": "all", "rho": 0.97, "wo_repeat": False}, 19456, 0),
    ("come", {"span_tokens": "all", "rho": 0.9}, 19456, 0),
    ("come_p", {"span_tokens": "all", "granularity": 10}, 4096, 0),
    ("come", {"norm": "dominant"}, 19456, 0),
    ("come", {}, 65536, 0),
    ("come", {"rho": 0.97}, 19456, 0),
    ("come", {"span_tokens": "all"}, 19456, 0),
    ("come", {}, 19456, 1),
    ("come", {}, 19456, 2),
    ("come", {}, 19456, 3),
]
COLUMNS = ["method", "options", "tokens", "seed", "dense", "pruned", "ratio", "seconds", "peak_gib", "sites"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--evaluation", default="embedded")
    parser.add_argument("--evaluation_tokens", type=int, default=16384)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--target", type=int, default=21)
    parser.add_argument("--dtype", default="float32", help="float32, or bfloat16 to look around quickly")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "come_settings.csv")
    arguments = parser.parse_args()
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    table = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    seen = {(r["method"], r["options"], r["tokens"], r["seed"]) for r in csv.DictReader(table)}
    tokenizer = models.load_tokenizer(arguments.model)
    held = token_windows(
        arguments.evaluation,
        tokenizer,
        split="evaluation",
        tokens=arguments.evaluation_tokens,
        seqlen=arguments.seqlen,
    )
    dense = models.load_model(arguments.model, arguments.dtype)
    before = perplexity(dense, held.input_ids, held.mask, title="dense").token
    for name, changes, tokens, seed in ROWS:
        options = {k: v for k, v in RELEASED.items() if name == "come" or k not in ("p", "rho")} | changes
        written = " ".join(f"{k}={v}" for k, v in options.items())
        if (name, written, str(tokens), str(seed)) in seen:
            continue
        data = CalibrationData(arguments.calibration, tokens=tokens, seqlen=arguments.seqlen)
        data.attach(tokenizer, bos=False, seed=seed)
        method = find(name)[1](**options)
        meter = Meter()
        module = prune(method, dense, data, arguments.target)
        seconds, peak = meter.seconds, peak_gib(meter, module.record)
        after = perplexity(module.student_model, held.input_ids, held.mask, title=written).token
        row = dict(
            zip(
                COLUMNS,
                [name, written, tokens, seed, f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}"]
                + [f"{seconds:.0f}", f"{peak:.2f}", " ".join(str(s.layers[0]) for s in module.record.steps)],
                strict=True,
            )
        )
        print(row, flush=True)
        del module, method, data
        gc.collect()  # a trainer and its module hold each other, and the states of a run are larger than the model
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        new = not arguments.out.is_file()
        with open(arguments.out, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
