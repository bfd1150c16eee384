"""What models are loaded as, and which are refused before anything is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import exit_code
from conftest import save_tiny, seeing_model, tiny_model, tiny_text, tiny_tokenizer
from torch import nn
from transformers import LlamaConfig

from come_pl import models
from come_pl.cli.prune import prune_main
from come_pl.decoder import Decoder
from come_pl.models import ModelError, load_model
from come_pl.pruning.methods.training import fit
from come_pl.pruning.module import PruningModule
from come_pl.record import Record
from come_pl.surgery import check_scalable, scale_stream
from come_pl.workflows.subject import Subject

BARE_NORMS = {"layer_norm_elementwise_affine": False, "enable_bias": False}  # Galactica's


def pruned(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, *words: object) -> int:
    text = tiny_text(folder / "text.txt")
    words = ("--model.path", model, "--data.calibration", text, "--evaluation.data", text, *words)
    words += ("--data.tokens", 256, "--data.seqlen", 16, "--evaluation.tokens", 128, "--output", folder / "run")
    return exit_code(prune_main, "prune.py", "--samples", "false", *words, monkeypatch=monkeypatch)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_quantised_weights_are_refused(offload: Any, tmp_path: Path) -> None:
    folder = Path(save_tiny(tmp_path / "fp8", "qwen3"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has quantised weights \(fp8\); give the plain ones"):
        load_model(str(folder), offload=offload)


def test_auto_is_the_dtype_of_where_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "half"
    tiny_model().to(torch.float16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_model(str(folder)).dtype == torch.float16
    assert load_model(str(folder), accelerated=False).dtype == torch.float32
    assert Subject(str(folder)).load("auto", torch.device("cpu")).dtype == torch.float32
    monkeypatch.undo()
    assert load_model(str(folder), accelerated=True).dtype == torch.float16

    asked: list[Any] = []

    def stop(*_: Any, **options: Any) -> None:
        asked.append(_[4] if len(_) > 4 else options.get("accelerated"))
        raise ModelError("enough")

    monkeypatch.setattr(models, "load_model", stop)
    assert pruned(tmp_path, monkeypatch, str(folder), "--trainer.accelerator", "cpu") == 2
    assert asked == [False]


def test_a_model_with_other_parts_is_not_read_from_disk(tmp_path: Path) -> None:
    seeing_model(layers=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="--offload disk reads models of text alone"):
        load_model(str(tmp_path), offload="disk")
    assert len(Decoder(load_model(str(tmp_path)))) == 3


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("opt", BARE_NORMS, "no weight in the norm before it (Galactica) cannot be scaled; give --compensate none"),
        ("opt-350m", {}, "normalises its stream after each sublayer (OPT-350m) cannot be scaled"),
    ],
)
def test_a_stream_that_cannot_be_scaled(
    family: str,
    options: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    model = tiny_model(family, **options)
    with pytest.raises(ValueError, match="cannot be scaled"):
        scale_stream(Decoder(model), 2, 3.0)
    folder = save_tiny(tmp_path / "model", family, **options)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    assert pruned(tmp_path, monkeypatch, folder, "--method", "prune_comp") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_untied_embeddings_need_no_weight_in_the_norm() -> None:
    check_scalable(Decoder(tiny_model("opt", tie_word_embeddings=False, **BARE_NORMS)))
    check_scalable(Decoder(tiny_model("opt")))


def test_layers_are_not_trained_in_float16_on_a_cpu_where_their_norms_cannot_be(tmp_path: Path) -> None:
    model = tiny_model("opt").to(torch.float16)
    module = PruningModule()
    module.attach(model, Record(len(Decoder(model))), needs=frozenset())
    with pytest.raises(ValueError, match="float16 on a CPU; give --model.dtype bfloat16 or float32"):
        fit(module, nn.LayerNorm(4), lambda _: pytest.fail("no"), None, epochs=1, order=torch.Generator())  # type: ignore[arg-type]


def test_what_a_layer_reads_is_not_kept_on_an_accelerator() -> None:
    """The device is known after the streams' room is made: a Trainer moves the module as it begins."""
    module = PruningModule()
    module.attach(tiny_model(), Record(4), needs=frozenset({"streams"}))
    module.begin_repair(1)
    assert module.inputs.layer == 1
    module._device = torch.device("cuda:0")
    module.begin_repair(1)
    assert module.inputs.layer is None


def test_a_fingerprint_is_of_the_config_and_of_more_than_one_column(tmp_path: Path) -> None:
    models_by_change: dict[str, Any] = {name: tiny_model(hidden_size=64) for name in ("none", "config", "columns")}
    models_by_change["config"].config.rms_norm_eps *= 2
    with torch.no_grad():
        models_by_change["columns"].model.layers[0].mlp.down_proj.weight[:, 1:].zero_()
    prints = {name: models.fingerprint(model) for name, model in models_by_change.items()}
    assert len(set(prints.values())) == 3
    models_by_change["none"].save_pretrained(tmp_path)
    assert models.fingerprint(load_model(str(tmp_path))) == prints["none"]


def test_the_config_of_a_gguf_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Until the file is another, and nobody's changes are another's; a folder's is read each time."""
    read = list[str]()

    def from_pretrained(path: str, **kwargs: Any) -> LlamaConfig:
        read.append(path)
        return LlamaConfig(num_hidden_layers=len(read))

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    first = models.load_config(str(file))
    first.vocab_size = 7
    second = models.load_config(str(file))
    assert len(read) == 1 and second.num_hidden_layers == 1 and second.vocab_size != 7
    file.write_bytes(b"GGUF, another")
    assert models.load_config(str(file)).num_hidden_layers == 2
    (tmp_path / "config.json").write_text("{}")
    assert [models.load_config(str(tmp_path)).num_hidden_layers for _ in range(2)] == [3, 4]
