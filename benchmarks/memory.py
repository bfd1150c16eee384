"""Where the memory of a pruning run goes, and what the statistics cost in time.

    python -m benchmarks.memory --calibration FILE --tokens 19456

Prints the resident memory of the process with its libraries, the size of model and calibration states, the peak while
pruning, and peak − libraries − states in units of the model; then the time of a statistics pass in units of the bare
forward of the decoder layers over the same tokens (median of 5 alternating pairs).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from lightning import Trainer

from come_pl import models
from come_pl.cli.common import quiet
from come_pl.data import CalibrationData
from come_pl.pruning.loop import ProgressivePruning
from come_pl.pruning.methods import find
from come_pl.pruning.module import PruningModule
from come_pl.record import Meter, Record

GIB = 2**30


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--target", type=int, default=21)
    arguments = parser.parse_args()
    quiet()
    data = CalibrationData(arguments.calibration, tokens=arguments.tokens, seqlen=arguments.seqlen)
    windows = data.attach(models.load_tokenizer(arguments.model), bos=False, seed=0)
    libraries = resident_gib()
    dense = models.load_model(arguments.model)
    model = models.parameter_count(dense) * 4 / GIB
    method = find("come")[1]()
    module = PruningModule()
    module.attach(dense, Record(dense.config.num_hidden_layers), needs=method.needs, span=method.span)
    hidden, depth = module.student.geometry.hidden, len(module.student)
    states = windows.input_ids.numel() * hidden * 4 * (depth + 1) / GIB
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_epochs=-1, callbacks=[ProgressivePruning(method, arguments.target)], enable_progress_bar=False, **options
    )
    meter = Meter()
    trainer.fit(module, datamodule=data)
    peak, seconds = meter.peak_gib, meter.seconds
    print(f"libraries {libraries:.2f} GiB, model {model:.2f} GiB, states {states:.2f} GiB, peak {peak:.2f} GiB")
    print(f"peak without libraries and states: {(peak - libraries - states) / model:.2f} x the model")
    print(f"{depth} to {arguments.target} layers in {seconds:.0f} s")

    batch = {"input_ids": windows.input_ids[:2], "mask": windows.mask[:2]}
    module.attach(dense, Record(depth), needs=method.needs, span=method.span)
    module.monitor_windows = 0
    ratios = []
    for _ in range(6):
        with torch.inference_mode():
            begin = time.perf_counter()
            module.teacher.run(batch["input_ids"])
            bare = time.perf_counter() - begin
            begin = time.perf_counter()
            module.training_step(batch, 0)
            ratios.append((time.perf_counter() - begin) / bare)
    print(f"statistics pass: {statistics.median(ratios[1:]):.2f} x the bare forward")


if __name__ == "__main__":
    main()
