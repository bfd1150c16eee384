"""Where the memory of a pruning run goes, and what the statistics cost in time.

    python -m benchmarks.memory --calibration FILE --tokens 19456

Prints the resident memory of the process with its libraries, the size of model and calibration states, the peak while
pruning, and peak − libraries − states in units of the model; then the time of a statistics pass in units of the bare
forward of the decoder layers over the same tokens (median of 5 alternating pairs).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.measure import GIB, peak_gib, prune, resident_gib, statistics_pass
from come_pl import models
from come_pl.cli.common import quiet
from come_pl.data import CalibrationData
from come_pl.decoder import Decoder
from come_pl.pruning.methods import find
from come_pl.record import Meter


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
    decoder = Decoder(dense)
    hidden, depth = decoder.geometry.hidden, len(decoder)
    states = windows.input_ids.numel() * hidden * 4 * (depth + 1) / GIB
    meter = Meter()
    record = prune(method, dense, data, arguments.target, monitor=4).record
    peak, seconds = peak_gib(meter, record), meter.seconds
    print(f"libraries {libraries:.2f} GiB, model {model:.2f} GiB, states {states:.2f} GiB, peak {peak:.2f} GiB")
    print(f"peak without libraries and states: {(peak - libraries - states) / model:.2f} x the model")
    print(f"{depth} to {arguments.target} layers in {seconds:.0f} s")

    data.windows = replace(windows, input_ids=windows.input_ids[:2], mask=windows.mask[:2])
    bare = statistics_pass(method, dense, data, 5, ours=True).bare
    print(f"statistics pass: {bare:.2f} x the bare forward")


if __name__ == "__main__":
    main()
