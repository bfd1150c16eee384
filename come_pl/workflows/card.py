"""The model card that is saved with a model: what was done to it, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from come_pl.models import EMBEDDED, PRETTY_NAMES
from come_pl.record import Record


def _layers(group: list[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"**{'+'.join(map(str, group))}**"


def pruned_card(info: Mapping[str, Any], record: Record) -> str:
    """Markdown of a pruned model's card, from the run's `run.json` and record."""
    model, data, method = info["model"], info["data"], info["method"]
    path = EMBEDDED if model["path"] == "embedded" else model["path"]
    options = ", ".join(f"{k} = {v}" for k, v in method.items() if k != "name")
    merges = sum(s.kind == "merge" for s in record.steps)
    drops = len(record.steps) - merges
    done = " and ".join(f"{n} {what}" for n, what in ((merges, "merges"), (drops, "drops")) if n)
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {path}"] if path.count("/") == 1 and not path.startswith((".", "/")) else []),
        "tags: [pruned, depth-pruning, come_pl]",
        "---",
        f"# {PRETTY_NAMES.get(path, path)}, {model['layers']} → {record.layers} layers",
        "",
        f"Made shallower by `come_pl` with the method `{method['name']}`{f' ({options})' if options else ''}: {done}.",
        f"Calibrated on {data['tokens']} tokens of `{data['source']}` "
        f"(windows of {data['seqlen']}), seed {info['seed']}.",
        "It is a stock checkpoint: same architecture, fewer layers, no custom code.",
        "",
        "| held-out text | tokens | dense perplexity | this model |",
        "|---|---|---|---|",
    ]
    for name, entry in info.get("perplexity", {}).items():
        lines.append(f"| {name} | {entry['tokens']} | {entry['dense']:.2f} | {entry['pruned']:.2f} |")
    if not info.get("perplexity"):
        lines.append("| not measured | | | |")
    lines += [
        "",
        "Dense layers that each layer stands for: " + ", ".join(_layers(group) for group in record.groups) + ".",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "To serve: `vllm serve PATH_OF_THIS_FOLDER`. To convert for llama.cpp: `convert_hf_to_gguf.py "
        "PATH_OF_THIS_FOLDER`. The licence is that of the base model.",
        "",
    ]
    return "\n".join(lines)
