"""Records: what is written, what is refused, and that a record is enough to do a run again."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_ids, tiny_model

from come_pl import memory
from come_pl import record as records
from come_pl.decoder import Decoder
from come_pl.record import Meter, Record, RecordError, Step, apply, groups_after, replay, write_atomically
from come_pl.surgery import Kept, share


def merge(layers: list[int], ratio: list[float] | None = None, norm: Any = "mean") -> Step:
    """A merge of tiny layers (2 KV heads, 48 neurons) that keeps every n-th channel of each of n layers."""
    n = len(layers)
    kept = [Kept(tuple(range(i, 2, n)), tuple(range(i, 48, n))) for i in range(n)]
    return Step("merge", layers, ratio or [1 / n] * n, kept, norm)


def drop(layer: int) -> Step:
    return Step("drop", [layer])


def test_step_round_trip():
    step = merge([1, 2], [0.25, 0.75], "fold")
    step.kept = [Kept((1,), (0, 3, 4, 47)), Kept((0,), ())]
    step.scores = {"span_distance": [0.123456789123, math.inf, math.nan], "loss": [1.0]}
    step.step, step.groups, step.loss, step.kl = 3, [[0], [1, 2]], 2.5, None
    step.seconds, step.peak_gib = 1.25, 0.5
    line = step.to_json()
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["kept"][0] == {"kv_heads": [1], "neurons": f"{2**0 + 2**3 + 2**4 + 2**47:x}"}
    assert entry["kept"][1]["neurons"] == "0"
    assert entry["scores"]["span_distance"] == [0.12345679, None, None]
    again = Step.from_json(line)
    assert again.kept == step.kept and again.ratio == step.ratio and again.norm == "fold"
    assert again.to_json() == line
    assert Step.from_json(drop(4).to_json()) == drop(4)


@pytest.mark.parametrize("neurons", [(), (0,), (7,), tuple(range(0, 100, 3)), tuple(range(64))])
def test_neuron_masks(neurons: tuple[int, ...]):
    assert records._from_hex(records._to_hex(neurons)) == neurons


@pytest.mark.parametrize(
    "steps, expected",
    [
        ([drop(0)], [[0, 1], [2], [3], [4]]),
        ([drop(2)], [[0], [1, 2], [3], [4]]),
        ([drop(4)], [[0], [1], [2], [3, 4]]),
        ([drop(0), drop(0)], [[0, 1, 2], [3], [4]]),
        ([merge([1, 2])], [[0], [1, 2], [3], [4]]),
        ([merge([1, 2, 3])], [[0], [1, 2, 3], [4]]),
        ([merge([3, 4]), merge([2, 3])], [[0], [1], [2, 3, 4]]),
        ([merge([0, 1]), drop(0), merge([1, 2])], [[0, 1, 2], [3, 4]]),
        ([Step("drop", [1, 2])], [[0, 1, 2], [3], [4]]),
    ],
)
def test_groups(steps: list[Step], expected: list[list[int]]):
    record = Record(5)
    for step in steps:
        record.append(step)
    assert record.groups == expected and record.layers == len(expected)
    assert [s.step for s in record.steps] == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    "step",
    [drop(2), drop(-1), Step("drop", [0, 1]), merge([1, 2]), merge([1, 0]), Step("merge", [0]), Step("drop", [])],
)
def test_impossible_steps(step: Step):
    with pytest.raises((ValueError, IndexError)):
        groups_after([[0], [1]], step)


def run(path: Path | None = None) -> tuple[Any, Decoder, Record]:
    """A run of every kind of step: (dense model, student, record)."""
    dense = tiny_model("qwen2-mixed", layers=7)
    student, record = Decoder(share(dense)), Record(7, path)
    for step in (
        merge([1, 2], [0.6, 0.4]),
        drop(4),
        merge([1, 2], [0.3, 0.7], "fold"),
        merge([1, 2], [0.5, 0.5], "dominant"),
    ):
        apply(step, student)
        record.append(step)
        record.write()
    assert record.groups == [[0], [1, 2, 3, 4, 5], [6]]
    return dense, student, record


def test_replay_is_bit_identical(tmp_path: Path):
    dense, student, record = run(tmp_path / "record.jsonl")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    again = replay(Record.read(tmp_path / "record.jsonl", 7), dense)
    expected = student.model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert again.config.to_dict() == student.model.config.to_dict()
    with torch.no_grad():
        assert torch.equal(again(tiny_ids()).logits, student.model(tiny_ids()).logits)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert again.model.layers[0].mlp.up_proj.weight is dense.model.layers[0].mlp.up_proj.weight


def test_three_layers_in_one_step():
    dense = tiny_model("llama", gqa=False)
    student = Decoder(share(dense))
    kept = [Kept((0, 3), (0, 1)), Kept((1,), tuple(range(5, 20))), Kept((2,), tuple(range(17, 48)))]
    step = Step("merge", [1, 2, 3], [0.5, 0.2, 0.3], kept, "fold")
    apply(step, student)
    assert len(student) == 2 and student.config.num_hidden_layers == 2
    assert torch.equal(student.layers[1].mlp.gate_proj.weight[:2], dense.model.layers[1].mlp.gate_proj.weight[:2])
    assert torch.equal(
        student.layers[1].mlp.down_proj.weight[:, 17:], dense.model.layers[3].mlp.down_proj.weight[:, 17:]
    )


def test_several_layers_dropped_in_one_step():
    dense = tiny_model("llama", layers=5)
    student = Decoder(share(dense))
    apply(Step("drop", [1, 2]), student)
    assert [layer.mlp.up_proj.weight.data_ptr() for layer in student.layers] == [
        dense.model.layers[i].mlp.up_proj.weight.data_ptr() for i in (0, 3, 4)
    ]


@pytest.mark.parametrize("ratio, kind", [([0.6, 0.4], "full_attention"), ([0.4, 0.6], "sliding_attention")])
def test_a_merge_takes_the_config_of_its_dominant_layer(ratio: list[float], kind: str):
    student = Decoder(tiny_model("qwen2-mixed"))
    apply(merge([1, 2], ratio), student)
    assert student.config.layer_types == ["sliding_attention", kind, "full_attention"]
    assert student.layers[1].self_attn.layer_type == kind


def truncated(text: str) -> str:
    return text[:-40]


def without_first(text: str) -> str:
    return text.partition("\n")[2]


def edited(key: str, value: Any) -> Callable[[str], str]:
    def edit(text: str) -> str:
        entries = [json.loads(line) for line in text.splitlines()]
        entries[0][key] = value
        return "".join(json.dumps(e) + "\n" for e in entries)

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        without_first,
        lambda text: text.replace("{", "[", 1),
        lambda text: "5\n" + text,
        lambda text: "null\n" + text,
        lambda text: text + "\n",
        edited("layers", None),
        edited("layers", ["1", "2"]),
        edited("layers", [2, 3]),
        edited("layers", []),
        edited("kind", "swap"),
        edited("kept", None),
        edited("kept", [{"kv_heads": [0]}]),
        edited("kept", [{"kv_heads": [0], "neurons": "xyz"}] * 2),
        edited("groups", [[0]]),
        edited("surprise", 1),
        edited("step", 2),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, damage: Callable[[str], str]):
    path = tmp_path / "record.jsonl"
    run(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError, match="record.jsonl line [1-5]"):
        Record.read(path, 7)


def test_foreign_records_are_refused(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    dense, _, record = run(path)
    with pytest.raises(RecordError, match="a model of 9 layers"):
        Record.read(path, 9)
    with pytest.raises(RecordError, match="7 layers, not 6"):
        replay(record, tiny_model("qwen2-mixed", layers=6))
    with pytest.raises(RecordError, match="step 1 .*48 FFN|step 1 .*64 FFN"):
        replay(record, tiny_model("qwen2-mixed", layers=7, intermediate_size=64))
    record.steps[0].kept = [Kept((0,), tuple(range(24))), Kept((5,), tuple(range(24)))]
    with pytest.raises(RecordError, match="step 1"):
        replay(record, dense)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not a text file"):
        Record.read(path, 7)


def test_empty_record_is_the_dense_model(tmp_path: Path):
    (tmp_path / "record.jsonl").write_text("")
    record = Record.read(tmp_path / "record.jsonl", 4)
    dense = tiny_model()
    assert record.groups == [[0], [1], [2], [3]] and len(Decoder(replay(record, dense))) == 4


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    path = tmp_path / "record.jsonl"
    write_atomically(path, "old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_text_is_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(file: int) -> None:
        order.append(f"fsync {os.fstat(file).st_size}")
        fsync(file)

    def renamed(source: Any, target: Any) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "file", "12345")
    assert order[:2] == ["fsync 5", "replace"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_meter_sees_memory_of_its_own_time():
    before = torch.ones(2**26)  # 0.25 GiB
    del before
    memory.give_back()  # a model that a test before this one loaded lets the process keep what is freed
    meter = Meter()
    idle = meter.peak_gib
    held = torch.ones(2**26)
    assert 0.2 < meter.peak_gib - idle < 0.4
    assert meter.seconds > 0 and held[0] == 1


@pytest.mark.parametrize("scale", [None, 1.25])
def test_weights_scale_and_blend_are_replayed_from_the_files(tmp_path: Path, scale: float | None) -> None:
    model = tiny_model(layers=5)
    record = Record(5, tmp_path / "record.jsonl")
    student = Decoder(share(model))
    shape = model.model.layers[0].mlp.down_proj.weight.shape
    blend = Step("blend", [1, 2], [0.25, 0.75], norm="first", weights={"1.mlp.down_proj.weight": torch.randn(shape)})
    for step in (blend, Step("drop", [2], scale=scale)):
        apply(step, student)
        record.append(step)
        record.write()
    again = Record.read(tmp_path / "record.jsonl", 5)
    assert again.groups == [[0], [1, 2, 3], [4]] and [s.scale for s in again.steps] == [None, scale]
    rebuilt = replay(again, model)
    for (name, one), other in zip(student.model.state_dict().items(), rebuilt.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    (tmp_path / "weights" / "001.safetensors").write_bytes(b"x")
    with pytest.raises(RecordError, match="line 1 .*weights"):
        Record.read(tmp_path / "record.jsonl", 5)
