"""Runs whose weights and streams are on disk: bit for bit those of ordinary runs, within the memory of one layer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import exit_code, is_one_line, kill_when, records
from conftest import save_tiny, tiny_ids, tiny_model, tiny_text
from lightning import Trainer
from safetensors.torch import load_file
from test_loop import Windows, lines
from transformers import AutoModelForCausalLM

from come_pl import models, offload
from come_pl.cli.prune import prune_main
from come_pl.cli.train import train_main
from come_pl.decoder import Decoder, family_of
from come_pl.offload import keep_on_host, matrices, move, present, stored
from come_pl.pruning.loop import ProgressivePruning
from come_pl.pruning.methods import METHODS, find
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit
from come_pl.pruning.streams import Block, FileBlock
from come_pl.record import Record, replay
from come_pl.tensors import TensorFile, TensorFileError

LAYERS, TARGET = 5, 3
CORE: dict[str, tuple[str, dict[str, Any], str]] = {  # name: (method, its options, refitted parts)
    "come": ("come", {"select": "local"}, "both"),
    "concat_merge": ("come", {"rho": 0.0, "span_tokens": "last", "select": "span"}, "none"),
    "prune_comp": ("prune_comp", {}, "none"),  # drops, and scales the weights below
    "magnitude": ("magnitude", {}, "none"),
    "repaired": ("prune_comp", {"windows": 2}, "all"),  # at the end, with what layers read
}
OTHERS: dict[str, dict[str, Any]] = {
    "mka": {"lambda_override": 0.4},
    "fusegpt": {"epochs": 1, "group_size": 3},
    "streamline": {"epochs": 1},
}


def pruned(
    folder: Path,
    checkpoint: str,
    method: str = "come",
    options: dict[str, Any] | None = None,
    parts: Any = "none",
    *,
    target: int = TARGET,
    on_host: bool = False,
    **settings: Any,
) -> PruningModule:
    """A run, 5 → 3 layers, saved; `settings` are those of the module."""
    folder.mkdir()
    torch.manual_seed(0)
    chosen = find(method)[1](**(options or {}))
    module = PruningModule(checkpoint, **settings)
    model = models.load_model(checkpoint, module.dtype_name, module.offload, folder / "weights")
    if on_host:
        keep_on_host(Decoder(model).layers)
    record = Record(LAYERS, folder / "record.jsonl")
    module.attach(model, record, needs=chosen.needs, span=chosen.span, scratch=folder / "streams")
    refit = Refit(parts).resolved(method, family_of(model.config))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = ProgressivePruning(chosen, target, refit=refit)
        trainer = Trainer(max_epochs=-1, callbacks=[callback], enable_progress_bar=False, **quiet)  # type: ignore[arg-type]
        trainer.fit(module, Windows())
    models.save_model(module.student_model, folder / "model")
    return module


def same(run: PruningModule, folder: Path, other: PruningModule, other_folder: Path) -> None:
    """Records and saved weights are equal, bit for bit."""
    assert lines(run) == lines(other)
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, other_folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def within_one_layer(module: PruningModule) -> None:
    """Nothing is in memory now, and never more was than the matrices of one layer."""
    kept = stored(module.student_model)
    assert {id(p) for p in kept} == {id(p) for p in matrices(module.student.layers)}, "new layers are stored too"
    store: Any = kept[0].stored  # type: ignore[attr-defined]
    layer = sum(p.nbytes for p in matrices(module.student.layers[0]))
    assert store.store.bytes_now == 0 < store.store.bytes_peak <= layer
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in stored(module))


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weights_and_streams_on_disk_change_nothing(tmp_path: Path, family: str, tied: bool, name: str) -> None:
    checkpoint = save_tiny(tmp_path / "dense", family, layers=LAYERS, tie_word_embeddings=tied)
    plain = pruned(tmp_path / "plain", checkpoint, *CORE[name])
    for number, settings in enumerate(({"offload": "disk"}, {"cache": "disk"}, {"offload": "disk", "cache": "disk"})):
        folder = tmp_path / str(number)
        found = pruned(folder, checkpoint, *CORE[name], **settings)
        same(found, folder, plain, tmp_path / "plain")
        if "offload" in settings:
            within_one_layer(found)
        if "cache" in settings:
            assert all(isinstance(b, FileBlock) for b in [*found._states, *found._teacher_states.values()] if b)


def test_what_a_repair_adds_to_a_step_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nearly the whole student, until the step is written; and written it is one matrix at a time."""
    held: list[int] = []
    write = Record.write

    def seen(self: Record) -> None:
        weights = self.steps[-1].weights
        if weights is not None:
            held.append(sum(w.untyped_storage().nbytes() for name, w in weights.items() if w.dim() == 2))
            held.append(sum(w.nbytes for name, w in weights.items() if w.dim() == 2))
        write(self)

    monkeypatch.setattr(Record, "write", seen)
    checkpoint = save_tiny(tmp_path / "dense", layers=LAYERS)
    pruned(tmp_path / "disk", checkpoint, "reverse", None, "all", offload="disk", cache="disk")
    there, whole = held
    assert there < whole / 1000, "parameters that are in files"


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("come", "prune_comp", "magnitude")])
def test_every_method_reads_weights_that_are_on_disk(tmp_path: Path, method: str) -> None:
    checkpoint = save_tiny(tmp_path / "dense", layers=LAYERS)
    plain = pruned(tmp_path / "plain", checkpoint, method, OTHERS.get(method))
    found = pruned(tmp_path / "disk", checkpoint, method, OTHERS.get(method), offload="disk")
    same(found, tmp_path / "disk", plain, tmp_path / "plain")
    within_one_layer(found)


def test_half_precision_and_host_memory(tmp_path: Path) -> None:
    """A checkpoint in fp32 is read as bf16; what is kept in host memory comes back the same."""
    checkpoint = save_tiny(tmp_path / "dense", layers=LAYERS)
    plain = pruned(tmp_path / "plain", checkpoint, dtype="bfloat16")
    for name, settings in (("disk", {"offload": "disk", "cache": "disk"}), ("host", {"on_host": True})):
        found = pruned(tmp_path / name, checkpoint, dtype="bfloat16", **settings)
        same(found, tmp_path / name, plain, tmp_path / "plain")
        within_one_layer(found)


def test_streams_beyond_the_budget_are_on_disk(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "dense", layers=LAYERS)
    plain = pruned(tmp_path / "plain", checkpoint)
    block = (LAYERS + 1) * 2 * 12 * 32 * 4  # boundaries, windows, tokens, channels, bytes
    found = pruned(tmp_path / "budget", checkpoint, cache_gib=1.5 * block / 2**30)
    assert [type(b) for b in found._states] == [Block, FileBlock, FileBlock]
    same(found, tmp_path / "budget", plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="cache_gib 1: .*--cache ram"):
        PruningModule(cache="none", cache_gib=1)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_a_big_result_is_saved_in_shards(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from where shards end, the folder is what transformers writes."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    offloaded = models.load_model(str(tmp_path / "stock"), offload="disk", scratch=tmp_path / "scratch")
    layer = sum(p.nbytes for p in Decoder(model).layers[0].parameters())
    monkeypatch.setattr(offload, "SHARD_BYTES", layer)
    models.save_model(offloaded, tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    stock_index = json.loads((tmp_path / "stock" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stock_index["weight_map"].keys()
    assert index["metadata"] == stock_index["metadata"]
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "saved" / f).stat().st_size <= layer + 4096 for f in files)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_text() == (tmp_path / "stock" / name).read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(offloaded(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_failed_forward_leaves_nothing_behind(tmp_path: Path) -> None:
    model = models.load_model(save_tiny(tmp_path / "dense"), offload="disk")
    store: Any = stored(model)[0].stored  # type: ignore[attr-defined]

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = Decoder(model).layers[1].mlp.down_proj.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="in the middle"):
        model(tiny_ids())
    handle.remove()
    assert store.store.bytes_now == 0
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(TensorFileError, match="cannot be read"):
        model(tiny_ids())
    with pytest.raises(TensorFileError), present(model):
        pass
    assert store.store.bytes_now == 0


def test_damaged_and_missing_files_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tiny_text(tmp_path / "text.txt")
    save_tiny(tmp_path / "dense", layers=LAYERS)
    tiny_model(layers=LAYERS).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    words = ["--model.path", "dense", "--offload", "disk", "--data.calibration", text, "--evaluation.data", text]
    words += ["--data.tokens", 512, "--data.seqlen", 32, "--evaluation.tokens", 512, "--target_layers", 3]
    (tmp_path / "dense" / "model.safetensors").unlink()
    shard = sorted((tmp_path / "dense").glob("model-*.safetensors"))[2]
    whole = shard.read_bytes()
    capsys.readouterr()

    def refused(expected: str) -> None:
        assert exit_code(prune_main, "prune.py", *words, "--overwrite", monkeypatch=monkeypatch) == 2
        assert is_one_line(capsys.readouterr().err, expected)

    shard.write_bytes(whole[:-10])
    refused(f"{shard.name}' is no whole safetensors file: it ends before")
    shard.write_bytes(whole[:6])
    refused("its header is cut short")
    shard.unlink()
    refused(f"{shard.name} is not there")
    for file in (tmp_path / "dense").glob("model*"):
        file.unlink()
    refused("model.safetensors is not there; a pickle (.bin) is first loaded")


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    """Our writer and reader against the library's."""
    from safetensors.torch import save_file

    from come_pl.tensors import write

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor([True, False]),
        "d": torch.ones(()),
    }
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for found in (load_file(tmp_path / "ours"), TensorFile(tmp_path / "theirs")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_killed_and_gone_on_with_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tiny_text(tmp_path / "text.txt", words=4000)
    checkpoint = save_tiny(tmp_path / "dense", layers=8)
    words = ["--model.path", checkpoint, "--data.calibration", text, "--evaluation.data", text, "--target_layers", 3]
    words += ["--data.tokens", 1024, "--data.seqlen", 32, "--evaluation.tokens", 512, "--refit_last", 2]
    assert exit_code(prune_main, "prune.py", *words, "--output", "plain", monkeypatch=monkeypatch) == 0
    words += ["--output", "disk", "--offload", "disk", "--cache", "disk"]
    kill_when((tmp_path / "disk" / "record.jsonl").exists, "prune.py", *words, cwd=tmp_path)
    assert 0 < len(records(tmp_path / "disk")) < 5 and (tmp_path / "disk" / ".scratch").is_dir()
    capsys.readouterr()
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "going on from step" in said and "no continuations with --offload disk" in said
    assert not (tmp_path / "disk" / ".scratch").exists()
    assert records(tmp_path / "disk") == records(tmp_path / "plain")
    infos = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "disk")]
    assert infos[0]["perplexity"] == infos[1]["perplexity"] and infos[0]["identity"] == infos[1]["identity"]
    ours, theirs = (load_file(tmp_path / f / "model" / "model.safetensors") for f in ("disk", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_a_record_is_replayed_on_a_model_that_is_on_disk(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "dense", layers=LAYERS)
    found = pruned(tmp_path / "run", checkpoint, *CORE["come"])
    offloaded = models.load_model(checkpoint, offload="disk")
    again = replay(Record.read(tmp_path / "run" / "record.jsonl", LAYERS), offloaded)
    assert len(stored(again)) == len(matrices(found.student.layers))
    assert torch.equal(again(tiny_ids()).logits, found.student_model(tiny_ids()).logits)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_teacher_on_disk_teaches_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tiny_text(tmp_path / "text.txt", words=4000)
    words = ["--model.path", save_tiny(tmp_path / "dense", layers=LAYERS), "--target_layers", 3, "--output", "pruned"]
    words += ["--data.calibration", text, "--data.tokens", 512, "--data.seqlen", 32]
    words += ["--evaluation.data", text, "--evaluation.tokens", 512]
    assert exit_code(prune_main, "prune.py", *words, "--samples", "false", monkeypatch=monkeypatch) == 0
    words = ["--distill", "mp", "--student", "pruned", "--source", text, "--tokens", 2048, "--seqlen", 32]
    words += ["--model.schedule", "sequential", "--trainer.precision", precision, "--samples", "false"]
    words += ["--evaluation.data", text, "--evaluation.tokens", 512, "--trainer.max_steps", 3]
    for output, more in (("plain", ()), ("disk", ("--offload", "disk"))):
        code = exit_code(train_main, "train.py", *words, "--output", output, *more, monkeypatch=monkeypatch)
        assert code == 0, capsys.readouterr().err
    infos = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "disk")]
    assert infos[0]["perplexity"] == infos[1]["perplexity"] and infos[0]["identity"] == infos[1]["identity"]
    ours, theirs = (load_file(tmp_path / f / "model" / "model.safetensors") for f in ("disk", "plain"))
    before = load_file(tmp_path / "pruned" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in ours.items()), "nothing was trained"


def test_another_dtype_is_that_of_later_reads(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "dense")
    offloaded = move(models.load_model(checkpoint, offload="disk"), torch.bfloat16)
    plain = models.load_model(checkpoint, "bfloat16")
    assert {p.dtype for p in offloaded.parameters()} == {torch.bfloat16}
    assert torch.equal(offloaded(tiny_ids()).logits, plain(tiny_ids()).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_another_dtype_leaves_a_model_as_it_would_be_loaded(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = models.load_model(str(tmp_path), "bfloat16")
    move(model, torch.bfloat16)
    for (name, own), (_, other) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert own.dtype == other.dtype and torch.equal(own, other), name
    with torch.no_grad():
        ids = tiny_ids(seq=24)
        assert torch.equal(model(ids).logits, loaded(ids).logits)
