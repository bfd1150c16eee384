"""The memory plan: which layers keep activations, the head, devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from cli import exit_code

from come_pl.cli.train import train_main
from come_pl.distillation.comparisons import KD, LM, LoRA
from come_pl.distillation.layerwise import CoMeMP
from come_pl.distillation.plan import GIB, device_count, memory_plan
from come_pl.models import on_meta

GROUPS = [[i] for i in range(6)] + [[6, 7], [8]]


def activations(module: Any, precision: str = "bf16-mixed", **over: Any) -> float:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes |= {"tie_word_embeddings": False} | over
    dense, small = (on_meta(transformers.LlamaConfig(num_hidden_layers=n, **sizes)) for n in (9, 8))
    module.attach(dense, small, GROUPS)
    on: dict[str, Any] = {"strategy": "auto", "devices": 1, "batch_size": 1, "seqlen": 64}
    return memory_plan(module, precision=precision, **on).activations * GIB


def test_adapters_below_the_merged_layers_keep_activations() -> None:
    pytest.importorskip("peft")
    lora, all_layers, merged = (activations(m) for m in (LoRA(), LM(trainable="layers"), LM(trainable="merged")))
    assert lora == pytest.approx(all_layers, rel=0.05) and lora > 2 * merged


def test_the_heads_share_grows_with_the_vocabulary() -> None:
    big = {"vocab_size": 128_000, "hidden_size": 512}
    each = 128_000 * 512  # parameters of the head
    trained, frozen = activations(KD(trainable="all"), **big), activations(KD(trainable="layers"), **big)
    assert trained - frozen == pytest.approx(10 * each, rel=0.01)  # measured: 14.2 and 4.2 bytes a parameter
    assert frozen - activations(LM(trainable="layers"), **big) == pytest.approx(2 * each, rel=0.01)  # the teacher's
    full = [activations(KD(trainable=t), "32-true", **big) for t in ("all", "layers")]
    assert full[0] - full[1] == pytest.approx(8 * each, rel=0.01)  # measured: 8.2
    assert activations(KD()) < 0.02 * GIB  # a few tokens of a small vocabulary: no chunk is full


@pytest.mark.parametrize(("said", "count"), [("2", 2), ("0,1", 2), ("[0, 1]", 2), ("[3]", 1), ("3,", 1), ("-1", 4)])
def test_devices_are_counted(said: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert device_count(said) == count


@pytest.mark.parametrize(
    ("more", "student", "teacher"),
    [
        ((), 4, "all"),
        (("--trainer.precision", "bf16-mixed"), 4, "all"),
        (("--trainer.precision", "bf16-mixed", "--trainer.strategy", "deepspeed_stage_3"), 2, "all"),
        (("--offload", "cpu"), 4, "all"),
        (("--offload", "disk"), 4, "rest"),
    ],
)
def test_what_processes_read_before_they_train_is_counted(
    more: tuple[str, ...],
    student: int,
    teacher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Both models, whole, in every process: the teacher as it is stored on an accelerator, the student in fp32, but as
    it is stored where DeepSpeed makes the fp32 copies."""
    sizes: dict[str, Any] = {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 2048}
    config = transformers.LlamaConfig(num_hidden_layers=10, num_attention_heads=8, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    on = ("--trainer.accelerator", "gpu", "--trainer.devices", "4", "--teacher", str(tmp_path), *more)
    assert exit_code(train_main, "train.py", "--plan", *on, monkeypatch=monkeypatch) == 0
    layer, outside = 4 * 512 * 512 + 3 * 512 * 2048 + 2 * 512, 2 * 40_000 * 512 + 512
    matrices = 10 * (layer - 2 * 512)
    ours = 7 * layer + outside  # 30 % of 10 layers fewer
    theirs = 10 * layer + outside - (matrices if teacher == "rest" else 0)
    told = float(capsys.readouterr().out.partition("host memory, 4 process(es) loading")[2].split()[0])
    assert told == pytest.approx(4 * (student * ours + 2 * theirs) / GIB, abs=2e-3)


def test_layers_that_were_fitted_are_not_the_teachers() -> None:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    plans = []
    for adapted in (False, True):
        dense, small = (on_meta(transformers.LlamaConfig(num_hidden_layers=n, **sizes)) for n in (9, 8))
        module = CoMeMP()
        module.attach(dense, small, GROUPS, adapted=adapted)
        on: dict[str, Any] = {"strategy": "auto", "devices": 1, "batch_size": 1, "seqlen": 64}
        plans.append(memory_plan(module, precision="32-true", **on))
    layers = 6 * 4 * module.student.layer_parameters / GIB  # below the merged one
    assert plans[0].shared - plans[1].shared == pytest.approx(layers) == plans[1].teacher - plans[0].teacher
