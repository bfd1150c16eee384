"""The defaults of prune.py on families that no small model at hand is of.

    python -m benchmarks.families --source FILE --evaluation FILE                 # qwen2 qwen3 mistral opt gemma
    python -m benchmarks.families --families opt --tokens 4194304 --layers 24

A small model of each family is trained on the next token of `--source` (a byte-level BPE of its own, AdamW, one cycle),
then pruned by prune.py as it is by default, and by ShortGPT's drops without a repair, on the same windows. What has
been trained for minutes says nothing of how much a large model loses; it says whether families with biases, other
norms and activations, whose layers have all learned something, are repaired as Llama's are. Writes OUTPUT/FAMILY/
(model, run folders) and after each family OUTPUT/families.csv and families.md. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.recover import call
from come_pl.data import DistillationData
from come_pl.decoder import family_of
from come_pl.record import write_atomically
from come_pl.text import iter_text
from come_pl.workflows.tables import markdown, write_csv, write_json

RUNS = {"dropped": ["--method", "shortgpt", "--refit", "none"], "default": []}
BATCH = 4  # windows a step: few tokens are best spent on many steps
TRAINING = ("source", "tokens", "seqlen", "vocabulary", "layers", "hidden", "lr", "seed")  # what a model depends on
COLUMNS = ["family", "parameters", "layers", "target", "trained_tokens", "training_seconds", "dense"]
COLUMNS += [name + what for name in RUNS for what in ("", "_times_dense", "_seconds")]


def config(family: str, vocabulary: int, layers: int, hidden: int) -> Any:
    """Of a small model with grouped-query attention where the family has it."""
    import transformers as t

    common = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    if family == "opt":
        return t.OPTConfig(ffn_dim=4 * hidden, word_embed_proj_dim=hidden, dropout=0.0, **common)
    common |= {"intermediate_size": 8 * hidden // 3 // 32 * 32, "num_key_value_heads": max(hidden // 64, 1)}
    classes = {"llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config}
    if family in classes:
        return classes[family](**common)
    if family == "gemma":
        return t.GemmaConfig(head_dim=32, hidden_activation="gelu_pytorch_tanh", **common)
    return t.Qwen3Config(head_dim=32, **common)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gemma")


def byte_pairs(source: str, vocabulary: int) -> Any:
    """A tokenizer of a text's own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = iter_text(source, "distillation")
    trained.train_from_iterator(texts, vocabulary, special_tokens=["<s>"], show_progress=False)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special)


def train(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> int:
    """Tokens that it was trained on, those of the source again and again."""
    data = DistillationData(
        arguments.source, tokens=arguments.tokens, seqlen=arguments.seqlen, batch_size=BATCH, validation_tokens=2048
    )
    data.attach(tokenizer, bos=family_of(model.config).needs_bos, seed=arguments.seed)
    assert data.windows is not None
    ids, order = data.windows.input_ids, torch.Generator().manual_seed(arguments.seed)
    steps = arguments.tokens // (BATCH * arguments.seqlen)
    optimizer = torch.optim.AdamW(model.parameters(), arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=max(steps, 2), pct_start=0.05)
    model.train()
    rows = torch.cat([torch.randperm(len(ids), generator=order) for _ in range(steps * BATCH // len(ids) + 1)])
    for step in range(steps):
        batch = ids[rows[BATCH * step : BATCH * (step + 1)]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: {loss.item():.3f} nats", flush=True)
    return steps * BATCH * arguments.seqlen


def trained(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What OUTPUT/FAMILY/trained.json says; without it, a model is trained first.

    Raises:
        SystemExit: a model of other settings is there.
    """
    from transformers import AutoModelForCausalLM

    folder = arguments.output / family
    told = folder / "trained.json"
    settings = {name: getattr(arguments, name) for name in TRAINING}
    if not told.is_file():
        tokenizer = byte_pairs(arguments.source, arguments.vocabulary)
        torch.manual_seed(arguments.seed)
        sizes = config(family, len(tokenizer), arguments.layers, arguments.hidden)
        model = AutoModelForCausalLM.from_config(sizes, dtype=torch.float32)
        began = time.monotonic()
        tokens = train(model, tokenizer, arguments)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        found = {"parameters": sum(p.numel() for p in model.parameters()), "trained_tokens": tokens}
        found |= {"training_seconds": round(time.monotonic() - began), "settings": settings}
        write_json(told, found)
    found = json.loads(told.read_text())
    if found.pop("settings") != settings:
        raise SystemExit(f"{folder} holds a model of other settings; give another --output")
    return found


def pruned(family: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`run.json` of one of `RUNS`.

    Raises:
        SystemExit: prune.py failed; it has said why.
    """
    folder = arguments.output / family / name
    words = ["--model.path", arguments.output / family / "model", "--output", folder, "--samples", "false"]
    words += [
        "--target_layers",
        arguments.target,
        "--data.calibration",
        arguments.source,
        "--data.seqlen",
        arguments.seqlen,
    ]
    words += ["--data.tokens", arguments.calibration_tokens, "--evaluation.data", arguments.evaluation]
    words += ["--evaluation.tokens", arguments.evaluation_tokens, *RUNS[name]]
    code = call("prune.py", *words)
    if code:
        raise SystemExit(f"{family}, {name}: prune.py ended with {code}")
    return json.loads((folder / "run.json").read_text())


def row(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    found = {"family": family, "layers": arguments.layers, "target": arguments.target} | trained(family, arguments)
    for name in RUNS:
        info = pruned(family, name, arguments)
        (entry,) = info["perplexity"].values()
        found["dense"] = round(entry["dense"], 2)
        found[name] = round(entry["pruned"], 2)
        found[f"{name}_times_dense"] = round(entry["pruned"] / entry["dense"], 3)
        found[f"{name}_seconds"] = round(info["seconds"]["prune"])
    return found


def read(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES[1:], choices=FAMILIES)
    parser.add_argument("--source", default="embedded", help="text to train and to calibrate on")
    parser.add_argument("--evaluation", default="embedded", help="held-out text")
    parser.add_argument("--tokens", type=int, default=1048576, help="to train each model on")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--target", type=int, default=8, help="layers to prune to")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 64")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--calibration_tokens", type=int, default=16384)
    parser.add_argument("--evaluation_tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=Path("runs/families"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    if arguments.hidden % 64 or not 0 < arguments.target < arguments.layers:
        parser.error("--hidden is a multiple of 64, and --target is at least 1 and below --layers")
    return arguments


def main() -> None:
    arguments = read()
    rows = []
    for family in arguments.families:
        rows.append(row(family, arguments))
        write_csv(arguments.output / "families.csv", COLUMNS, rows)
        table = markdown(COLUMNS, [[r.get(name, "") for name in COLUMNS] for r in rows])
        write_atomically(arguments.output / "families.md", table)
    print(table)


if __name__ == "__main__":
    main()
