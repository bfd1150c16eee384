"""The model card that is saved with a model: what was done to it, how good it is, and how to use it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from come_pl.models import EMBEDDED, PRETTY_NAMES, locate
from come_pl.record import Record
from come_pl.report.repair import repair_words
from come_pl.report.style import amount, number, plural
from come_pl.runs import RunError, read_run

USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

Serve it with vLLM:

```bash
vllm serve PATH_OF_THIS_FOLDER
```

Convert it for llama.cpp (`convert_hf_to_gguf.py` is in its repository; `come-export PATH_OF_THIS_FOLDER` runs it):

```bash
python convert_hf_to_gguf.py PATH_OF_THIS_FOLDER --outfile model.gguf --outtype f16
```
"""


@dataclass(frozen=True)
class Licence:
    """What a base model says of its licence, as its own model card has it."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def front_matter(self) -> list[str]:
        named = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return [f"{key}: {value}" for key, value in named.items() if value]


def licence(path: str) -> Licence | None:
    """The licence of a model: from its model card, or from the metadata of a GGUF file; None where neither says."""
    where = locate(path)
    if where.gguf_file:
        with contextlib.suppress(Exception):  # a metadata field that says nothing decides nothing
            from gguf import GGUFReader

            found = GGUFReader(Path(where.path) / where.gguf_file).get_field("general.license")
            if found is not None:
                return _licence({"license": found.contents()})
    for folder in _folders(where.path):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return _licence(_front_matter((folder / "README.md").read_text(encoding="utf-8")))
    return None


def licence_files(path: str) -> list[Path]:
    """The texts of a base model's licence in its folder: LICENSE, NOTICE and the like."""
    pattern = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([-_.].*)?", re.IGNORECASE)
    folders = _folders(locate(path).path)
    return sorted(f for folder in folders if folder.is_dir() for f in folder.iterdir() if pattern.fullmatch(f.name))


def _folders(path: str) -> list[Path]:
    """A local folder, or that of the cache where a hub model's card is, if it was fetched."""
    if Path(path).is_dir():
        return [Path(path)]
    from huggingface_hub import try_to_load_from_cache

    known = [try_to_load_from_cache(path, name) for name in ("README.md", "config.json")]
    return list(dict.fromkeys(Path(file).parent for file in known if isinstance(file, str)))


def _front_matter(card: str) -> dict[str, Any]:
    import yaml

    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", card, re.S)
    with contextlib.suppress(yaml.YAMLError):
        content = yaml.safe_load(found[1]) if found else {}
        return content if isinstance(content, dict) else {}
    return {}


def _licence(entries: Mapping[str, Any]) -> Licence | None:
    def line(key: str) -> str | None:
        value = entries.get(key)
        value = value[0] if isinstance(value, list) and value else value
        return " ".join(str(value).split()) if value else None

    name = line("license")
    return Licence(name, line("license_name"), line("license_link")) if name else None


def pruned_card(info: Mapping[str, Any], record: Record) -> str:
    """Markdown of a pruned model's card, from the run's `run.json` and record."""
    merges = sum(not s.drops for s in record.steps)
    drops = len(record.steps) - merges
    done = " and ".join(plural(n, what) for n, what in ((merges, "merge"), (drops, "drop")) if n)
    story = [_pruning(info, f": {done}", whole=record.layers <= info.get("target_layers", record.layers))]
    return _card(info, record.groups, "pruned", story, {"dense": "dense perplexity", "pruned": "this model"})


def distilled_card(info: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Markdown of a distilled model's card, from its `run.json` and that of the run that it began from."""
    begun = "before" if "student" in student else "pruned"
    story, taught = [_training(info)], _taught(info)
    seen: list[str] = []
    while "student" in student and student["student"].get("run") not in seen:  # distilled before
        story.append(_training(student))
        taught = taught or _taught(student)
        seen.append(student["student"].get("run"))
        try:
            student = read_run(Path(seen[-1]))
        except (RunError, TypeError):
            student = {}
    if student.get("data"):
        story.append(_pruning(student))
    story = story[::-1]
    columns = {"dense": "dense perplexity", "before": begun, "after": "this model"}
    return _card(info, info["groups"], "distilled" if taught else "trained", story, columns)


def _taught(info: Mapping[str, Any]) -> bool:
    """Whether a training learned from the dense model, and not from text alone."""
    method = info.get("method") or {}
    return method.get("objective", "lm" if method.get("name") in ("lm", "lora") else "kd") != "lm"


def _training(info: Mapping[str, Any]) -> str:
    data, run = info["data"], (info.get("student") or {}).get("run")
    how = "Distilled from the dense model" if _taught(info) else "Trained on text"
    return (
        f"{how}, beginning with the run `{run}`, with the method {_method(info)} on "
        f"{info['tokens_seen']} tokens of `{data['source']}` (windows of {data['seqlen']}, seed {info['seed']}); "
        f"{amount(info['trained_parameters'])} of {amount(info['parameters'])} parameters were trained."
    )


def _pruning(info: Mapping[str, Any], done: str = "", whole: bool = True) -> str:
    data, repaired = info["data"], repair_words(info.get("refit"), whole)
    said = (
        f"Made shallower by `come_pl` with the method {_method(info)}{done}. Calibrated on {data['tokens']} tokens of "
        f"`{data['source']}` (windows of {data['seqlen']}, seed {info.get('seed')})."
    )
    return f"{said} {repaired}".rstrip()


def _method(info: Mapping[str, Any]) -> str:
    method = info.get("method") or {}
    options = ", ".join(f"{k} = {v}" for k, v in method.items() if k != "name")
    return f"`{method.get('name')}`" + (f" ({options})" if options else "")


def _card(
    info: Mapping[str, Any],
    groups: Sequence[Sequence[int]],
    what: str,
    story: Sequence[str],
    columns: Mapping[str, str],
) -> str:
    path = EMBEDDED if info["model"]["path"] == "embedded" else info["model"]["path"]
    base = PRETTY_NAMES.get(path, path)
    on_hub = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    terms = licence(path)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *(terms.front_matter if terms else []),
        *([f"base_model: {path}"] if on_hub else []),
        f"tags: [{what}, depth-pruning, come_pl]",
        "---",
        f"# {base}, {info['model']['layers']} → {len(groups)} layers, {what}",
        "",
        *story,
        "It is a stock checkpoint: same architecture, fewer layers, no custom code.",
        "",
        "## Quality",
        "",
        *(_table(info["perplexity"], columns) if info.get("perplexity") else ["Not measured.", ""]),
        "## Layers",
        "",
    ]
    stands = ", ".join(str(g[0]) if len(g) == 1 else f"**{'+'.join(map(str, g))}**" for g in groups)
    lines += [f"Dense layers that each layer stands for: {stands}.", "", USE, "## Licence", ""]
    said = f"That of the base model, {base}"
    lines.append(f"{said}: {terms.name or terms.id}." if terms else f"{said}, which does not say it in its folder.")
    return "\n".join(lines) + "\n"


def _table(perplexity: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Perplexity of each text, and the share of the dense model's quality that is kept."""
    heads = ["held-out text", "tokens", *columns.values(), "quality kept"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    last = list(columns)[-1]
    for text, entry in perplexity.items():
        kept = f"{entry['dense'] / entry[last]:.1%}" if math.isfinite(entry[last]) else "0.0%"
        values = " | ".join(number(entry[key]) for key in columns)
        lines.append(f"| {text} | {entry['tokens']} | {values} | {kept} |")
    return [
        *lines,
        "",
        "Perplexity of held-out text, lower is better; quality kept: dense perplexity / this model's.",
        "",
    ]
