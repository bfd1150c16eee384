"""A model that does not fit into the memory that a run may have is pruned, and what that took.

    python -m benchmarks.bigger_than_memory --folder /tmp/big                     # 3.1B parameters in fp32, 4 GiB
    python -m benchmarks.bigger_than_memory --folder /tmp/small --scale 0.08 --limit_gib 2.5 --compare

Writes a random Llama to --folder, one layer at a time (kept, and used again), with a tokenizer of made-up words and a
text of them; then runs `prune.py --offload disk --cache disk --refit none` under a hard limit on address space, and
prints the largest address space and resident memory of that process and the seconds. --compare prunes once more with
everything in memory and without a limit, and demands the same record and the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from come_pl import tensors

GIB = 2**30
ROOT = Path(__file__).parents[1]


def llama_config(scale: float, layers: int, tied: bool) -> Any:
    """Sizes of the 3B model, all widths times `scale`."""
    from transformers import LlamaConfig

    heads = max(1, round(24 * scale))
    return LlamaConfig(
        hidden_size=128 * heads,
        intermediate_size=max(128, round(8192 * scale / 64) * 64),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        vocab_size=max(512, round(32000 * scale)),
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
    shapes |= {f"mlp.{p}_proj.weight": (ffn, hidden) for p in ("gate", "up")}
    shapes["mlp.down_proj.weight"] = (hidden, ffn)
    return shapes | {f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}


def parts(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of what goes into each file."""
    yield {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        yield {f"model.layers.{index}.{name}": shape for name, shape in layer_shapes(config).items()}
    yield {"model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        yield {"lm_head.weight": (config.vocab_size, config.hidden_size)}


def write_checkpoint(folder: Path, config: Any, seed: int = 0) -> int:
    """Writes the model, file by file; returns its parameters. A folder that is whole is left as it is."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        return int(json.loads(index_file.read_text())["metadata"]["total_parameters"])
    folder.mkdir(parents=True, exist_ok=True)
    order = torch.Generator().manual_seed(seed)
    weight_map, count, files = {}, 0, list(parts(config))
    for number, part in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        made = {}
        for name, shape in part.items():
            if len(shape) == 1:
                made[name] = torch.ones(shape)
            else:
                made[name] = torch.randn(shape, generator=order).mul_(1.0 if "embed" in name else shape[1] ** -0.5)
            count += made[name].numel()
        tensors.write(folder / file, made)
        weight_map |= dict.fromkeys(part, file)
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    index_file.write_text(json.dumps({"metadata": {"total_parameters": count}, "weight_map": weight_map}))
    return count


def write_tokenizer(folder: Path, words: int) -> None:
    """One token a word: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<pad>": 1, "<unk>": 2, **{f"w{i}": 3 + i for i in range(words - 3)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_text(file: Path, vocabulary: int, words: int = 20_000) -> None:
    numbers = torch.randint(0, vocabulary - 3, (words,), generator=torch.Generator().manual_seed(1)).tolist()
    file.write_text("\n\n".join(" ".join(f"w{n}" for n in numbers[i : i + 50]) for i in range(0, words, 50)))


def watched(command: list[str], limit_gib: float | None, log: Path) -> dict[str, float]:
    """Runs a command, under a hard limit on its address space; what the kernel says about it.

    Returns:
        rc, seconds, peak_gib (resident), address_space_gib.
    """

    def limit() -> None:
        if limit_gib is not None:
            most = int(limit_gib * GIB)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

    found = {"peak_gib": 0.0, "address_space_gib": 0.0}
    begin = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, preexec_fn=limit, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            for line in status.splitlines():
                for key, name in (("VmHWM:", "peak_gib"), ("VmPeak:", "address_space_gib")):
                    if line.startswith(key):  # a run resets its own high-water mark, so the largest is kept
                        found[name] = max(found[name], int(line.split()[1]) / 2**20)
            time.sleep(0.2)
    return found | {"rc": process.wait(), "seconds": time.perf_counter() - begin}


def same(first: Path, second: Path) -> bool:
    """Whether two run folders hold the same record and the same weights, bit for bit."""

    def steps(folder: Path) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
        return [{k: v for k, v in step.items() if k not in ("seconds", "peak_gib")} for step in found]

    def weights(folder: Path) -> dict[str, tensors.Entry]:
        files = (folder / "model").glob("*.safetensors")
        return {name: entry for file in files for name, entry in tensors.entries(file).items()}

    ours, theirs = weights(first), weights(second)
    return (
        steps(first) == steps(second)
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name].read(), theirs[name].read()) for name in ours)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all widths")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--target_layers", type=int)
    parser.add_argument("--tied", action="store_true", help="one matrix for embeddings and head")
    parser.add_argument("--limit_gib", type=float, default=4.0)
    parser.add_argument("--method", default="come")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--compare", action="store_true", help="prune once more in memory; demand the same")
    arguments = parser.parse_args()
    config = llama_config(arguments.scale, arguments.layers, arguments.tied)
    dense, text = arguments.folder / "dense", arguments.folder / "text.txt"
    parameters = write_checkpoint(dense, config)
    write_text(text, config.vocab_size)
    target = arguments.target_layers or arguments.layers - max(1, arguments.layers // 8)
    print(f"{parameters / 1e9:.2f}B parameters, {parameters * 4 / GIB:.2f} GiB in fp32, {arguments.layers} layers")

    def pruned(name: str, limit_gib: float | None, *more: object) -> Path:
        output = arguments.folder / name
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, ROOT / "prune.py", "--method", arguments.method, "--model.path", dense]
        command += ["--target_layers", target, "--data.calibration", text, "--data.tokens", arguments.tokens]
        command += ["--data.seqlen", arguments.seqlen, "--data.batch_size", arguments.batch_size]
        command += ["--evaluation.data", text, "--evaluation.tokens", 4 * arguments.seqlen, "--refit", "none"]
        command += ["--samples", "false", "--output", output, *more]
        found = watched([str(word) for word in command], limit_gib, arguments.folder / f"{name}.log")
        allowed = "no limit" if limit_gib is None else f"limit {limit_gib} GiB"
        print(
            f"{name}: {'done' if found['rc'] == 0 else 'FAILED'} in {found['seconds']:.0f} s, peak resident "
            f"{found['peak_gib']:.2f} GiB, address space {found['address_space_gib']:.2f} GiB ({allowed})"
        )
        if found["rc"] != 0:
            raise SystemExit((arguments.folder / f"{name}.log").read_text()[-2000:])
        return output

    limited = pruned("limited", arguments.limit_gib, "--offload", "disk", "--cache", "disk")
    if arguments.compare and not same(limited, pruned("in_memory", None)):
        raise SystemExit("record or weights differ from those of a run in memory")
    if arguments.compare:
        print("the same record and the same weights, bit for bit")


if __name__ == "__main__":
    main()
