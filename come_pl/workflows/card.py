"""The model card that is saved with a model: what was done to it, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from come_pl.models import EMBEDDED, PRETTY_NAMES
from come_pl.record import Record

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

To serve: `vllm serve PATH_OF_THIS_FOLDER`. To convert for llama.cpp: `convert_hf_to_gguf.py PATH_OF_THIS_FOLDER`.
The licence is that of the base model.
"""


def pruned_card(info: Mapping[str, Any], record: Record) -> str:
    """Markdown of a pruned model's card, from the run's `run.json` and record."""
    merges = sum(s.kind != "drop" for s in record.steps)
    drops = len(record.steps) - merges
    done = " and ".join(f"{n} {what}" for n, what in ((merges, "merges"), (drops, "drops")) if n)
    data = info["data"]
    story = [
        f"Made shallower by `come_pl` with the method {_method(info)}: {done}.",
        f"Calibrated on {data['tokens']} tokens of `{data['source']}` (windows of {data['seqlen']}), "
        f"seed {info['seed']}.",
    ]
    return _card(info, record.groups, "pruned", story, {"dense": "dense perplexity", "pruned": "this model"})


def distilled_card(info: Mapping[str, Any]) -> str:
    """Markdown of a distilled model's card, from the run's `run.json`."""
    data = info["data"]
    story = [
        f"Made shallower by `come_pl` and distilled from the dense model with the method {_method(info)}.",
        f"Distilled on {info['tokens_seen']} tokens of `{data['source']}` (windows of {data['seqlen']}), "
        f"seed {info['seed']}; {info['trained_parameters'] / 1e6:.1f}M of {info['parameters'] / 1e6:.1f}M parameters "
        "trained.",
    ]
    columns = {"dense": "dense perplexity", "before": "pruned", "after": "this model"}
    return _card(info, info["groups"], "distilled", story, columns)


def _method(info: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k} = {v}" for k, v in info["method"].items() if k != "name")
    return f"`{info['method']['name']}`" + (f" ({options})" if options else "")


def _card(
    info: Mapping[str, Any],
    groups: Sequence[Sequence[int]],
    what: str,
    story: Sequence[str],
    columns: Mapping[str, str],
) -> str:
    path = EMBEDDED if info["model"]["path"] == "embedded" else info["model"]["path"]
    on_hub = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {path}"] if on_hub else []),
        f"tags: [{what}, depth-pruning, come_pl]",
        "---",
        f"# {PRETTY_NAMES.get(path, path)}, {info['model']['layers']} → {len(groups)} layers, {what}",
        "",
        *story,
        "It is a stock checkpoint: same architecture, fewer layers, no custom code.",
        "",
    ]
    if info.get("perplexity"):
        lines += [
            "| held-out text | tokens | " + " | ".join(columns.values()) + " |",
            "|---|---" + "|---" * len(columns) + "|",
        ]
        for text, entry in info["perplexity"].items():
            values = " | ".join(f"{entry[key]:.2f}" for key in columns)
            lines.append(f"| {text} | {entry['tokens']} | {values} |")
        lines.append("")
    stands = ", ".join(str(g[0]) if len(g) == 1 else f"**{'+'.join(map(str, g))}**" for g in groups)
    return "\n".join([*lines, f"Dense layers that each layer stands for: {stands}.", "", USE])
