"""Losses, gradients, learning rates and the loop of distillation, on tiny models."""

from __future__ import annotations

import copy
import csv
import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny, seeing_model, tiny_ids, tiny_model, tiny_text, tiny_tokenizer
from lightning import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from come_pl.cli.common import guarded
from come_pl.data import DistillationData
from come_pl.decoder import Decoder
from come_pl.distillation import losses
from come_pl.distillation.comparisons import KD, LM, Hybrid, LoRA
from come_pl.distillation.layerwise import CoMeMP, CoMeSP
from come_pl.distillation.module import DistillationModule, Diverged, NothingToTrain
from come_pl.distillation.rates import PRESETS, BadRate, by_depth, cosine, learning_rates
from come_pl.distillation.student import Misfit, read_pruned
from come_pl.models import load_model
from come_pl.record import Record, Step, replay
from come_pl.runs import Run, RunError
from come_pl.surgery import drop
from come_pl.taps import stream_from
from come_pl.workflows import distil as workflow
from come_pl.workflows.distil import distil
from come_pl.workflows.texts import EvaluationText

GROUPS = [[0], [1, 2], [3], [4, 5]]


def pruned_pair(family: str = "llama", seed: int = 0) -> tuple[Any, Any]:
    """A 6-layer teacher and its 4-layer student, in which layers 2 and 5 were dropped (GROUPS)."""
    teacher = tiny_model(family, layers=6, seed=seed)
    student = copy.deepcopy(teacher)
    for index in (5, 2):
        drop(Decoder(student), index)
    return teacher, student


def batch_of(windows: int = 3, seq: int = 12, padded: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    mask = torch.ones(windows, seq, dtype=torch.bool)
    if padded:
        mask[0, -padded:] = False
    return {"input_ids": tiny_ids(windows, seq, seed), "mask": mask}


def attached(module: Any, family: str = "llama") -> Any:
    module.attach(*pruned_pair(family), GROUPS)
    return module


def test_a_scaled_student_is_compared_with_a_scaled_teacher() -> None:
    """What a compensated drop did to the stream is no error: a merged layer below it loses as much as unscaled."""
    found = []
    for scale in (None, 2.0):
        teacher = tiny_model("llama", layers=6)
        record = Record(6)
        for step in (Step("drop", [5], scale=scale), Step("drop", [2])):
            record.append(step)
        module = CoMeMP()
        module.attach(teacher, replay(record, teacher), record.groups, record.scales)
        assert record.scales == (None if scale is None else [2.0] * 6 + [1.0])
        found.append(module.losses(batch_of())["layer 1"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


def test_float16_does_not_lose_the_gradients_of_logits() -> None:
    """Those of a mean over thousands of tokens are below what float16 holds until a loss scaler comes."""
    sizes: dict[str, Any] = {"vocab_size": 1024, "tie_word_embeddings": False}
    student, teacher = (Decoder(tiny_model("llama", seed=s, **sizes)) for s in (0, 1))
    with torch.no_grad():
        for near, parameter in zip(student.model.parameters(), teacher.model.parameters()):
            parameter.copy_(near + 0.1 * parameter)
    ids, head = tiny_ids(64, 64), student.model.get_output_embeddings()
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        ours, theirs = student.run(ids), teacher.run(ids)
    found: list[list[torch.Tensor]] = []
    for half in (False, True):
        hidden, head.weight.grad = ours.clone().requires_grad_(), None
        with torch.autocast("cpu", torch.float16, enabled=half):
            value = losses.logit_divergence(student, hidden, teacher, theirs, mask)
        (value * 2**16).backward()
        assert hidden.grad is not None and head.weight.grad is not None
        found.append([hidden.grad / 2**16, head.weight.grad / 2**16])
    for exact, half_precise in zip(*found):
        assert (exact - half_precise).norm() < 1e-3 * exact.norm()


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "kl", "cosine"])
def test_state_losses_against_a_loop_over_tokens(kind: Any) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    theirs[:, 0, 3] = 900.0  # a massive activation
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    total, count = 0.0, 0
    for b in range(2):
        for t in range(5):
            if not mask[b, t]:
                continue
            s, h = ours[b, t].double(), theirs[b, t].double()
            if kind == "mse":
                total += float(((s - h) ** 2).sum() / (h**2).sum())
            elif kind == "kl":
                scale = 2.0 * (h**2).mean().sqrt()
                p, q = (h / scale).softmax(-1), (s / scale).softmax(-1)
                total += 4.0 * float((p * (p / q).log()).sum())
            else:
                total += 1 - float(s @ h / s.norm() / h.norm())
            count += 1
    found = losses.state_loss(ours, theirs, mask, kind, temperature=2.0)
    torch.testing.assert_close(float(found), total / count, rtol=1e-4, atol=1e-6)


def test_massive_activations_do_not_drown_the_rest() -> None:
    torch.manual_seed(0)
    theirs = torch.randn(1, 50, 8)
    theirs[0, 0] *= 1000
    mask = torch.ones(1, 50, dtype=torch.bool)
    wrong_at_massive, wrong_elsewhere = theirs.clone(), theirs.clone()
    wrong_at_massive[0, 0] *= 1.1
    wrong_elsewhere[0, 1:] *= 1.1
    small = losses.state_loss(wrong_at_massive, theirs, mask)
    assert float(losses.state_loss(wrong_elsewhere, theirs, mask) / small) == pytest.approx(49, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("kind", ["kl", "lm", "labelled"])
def test_chunked_logits_are_exact_with_gradients(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pruned_pair(family)
    ours, theirs, batch = Decoder(student), Decoder(teacher), batch_of(padded=3)
    ids, mask = batch["input_ids"], batch["mask"]
    with torch.no_grad():
        target = theirs.run(ids)
    head = student.get_output_embeddings().weight
    results = []
    for chunk in (5, None):
        if chunk:
            monkeypatch.setattr(losses, "chunk_length", lambda batch, vocabulary: 5)
        student.zero_grad()
        hidden = ours.run(ids)
        if chunk and kind == "lm":
            value = losses.language_modelling(ours, hidden, ids, mask)
        elif chunk:
            labels = {"input_ids": ids, "label_weight": 0.3} if kind == "labelled" else {}
            value = losses.logit_divergence(ours, hidden, theirs, target, mask, temperature=2.0, **labels)
        else:
            p, q = (theirs.logits(target) / 2).log_softmax(-1), (ours.logits(hidden) / 2).log_softmax(-1)
            divergence = 4 * ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()
            counted = mask[:, 1:] & mask[:, :-1]
            each = F.cross_entropy(ours.logits(hidden)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            modelling = (each * counted).sum() / counted.sum()
            value = {"kl": divergence, "lm": modelling, "labelled": 0.7 * divergence + 0.3 * modelling}[kind]
        (3 * value).backward()
        first = next(ours.layers[0].parameters()).grad
        results.append((value.detach(), head.grad.clone(), first.clone()))  # type: ignore[union-attr]
    for chunked, whole in zip(*results):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)


def test_a_validation_takes_no_gradient_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    student = Decoder(pruned_pair()[1])
    batch = batch_of()
    student.model.get_output_embeddings().weight.requires_grad_(True)
    hidden = student.run(batch["input_ids"])
    value = losses.language_modelling(student, hidden, batch["input_ids"], batch["mask"])
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient"))
    with torch.no_grad():
        found = losses.language_modelling(student, hidden, batch["input_ids"], batch["mask"])
    assert torch.equal(found, value.detach())


def test_weights_are_read_before_their_strategy_lets_them_go(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's collectives need the device that its teardown takes the weights from."""
    expected = load_file(start(student_run, tmp_path / "plain", CoMeMP(lr=1e-3)) / "model" / "model.safetensors")
    teardown = SingleDeviceStrategy.teardown

    def emptied(self: Any) -> None:
        with torch.no_grad():
            for parameter in self.lightning_module.student_model.parameters():
                parameter.mul_(torch.nan)
        teardown(self)

    monkeypatch.setattr(SingleDeviceStrategy, "teardown", emptied)
    found = load_file(start(student_run, tmp_path / "torn", CoMeMP(lr=1e-3)) / "model" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_room_is_asked_for_what_learns(student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(workflow, "check_space", lambda folder, gib: asked.append(gib * 2**30))
    folder = start(student_run, tmp_path / "o", LoRA(lr=1e-3, r=2), method="lora")
    info = json.loads((folder / "run.json").read_text())
    assert asked[0] == pytest.approx(4 * info["parameters"])
    assert asked[1] == pytest.approx(4 * (7 * info["trained_parameters"] + info["parameters"]))


@pytest.mark.parametrize(
    ("method", "module", "repaired", "warned"),
    [
        ("mp", lambda: CoMeMP(lr=1e-3), True, True),
        ("mp", lambda: CoMeMP(lr=1e-3), False, False),
        ("sp", lambda: CoMeSP(lr=1e-3, logit_weight=1.0), True, False),
        ("lm", lambda: LM(lr=1e-3), True, False),
    ],
)
def test_what_makes_a_model_worse_is_said(
    method: str,
    module: Any,
    repaired: bool,
    warned: bool,
    student_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    shutil.copytree(student_run, tmp_path / "home")
    info = json.loads((tmp_path / "home" / "run" / "run.json").read_text())
    info["refit"] = {"parts": "down" if repaired else "none"}
    (tmp_path / "home" / "run" / "run.json").write_text(json.dumps(info))
    folder = start(tmp_path / "home", tmp_path / "o", module(), method=method, samples=False)
    said = capsys.readouterr().out
    assert ("that can make it worse" in said) == warned
    info = json.loads((folder / "run.json").read_text())
    [name] = info["perplexity"]
    for after, worse in ((info["perplexity"][name]["before"] * 1.01, True), (1.0, False)):
        info["perplexity"][name]["after"] = after
        assert ("worse than before training on text.txt: take" in workflow.summary(info)) == worse


def test_a_run_without_a_validation_writes_json(student_run: Path, tmp_path: Path) -> None:
    folder = start(student_run, tmp_path / "o", CoMeMP(lr=1e-3), trainer={"limit_val_batches": 0})
    text = (folder / "run.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["validation"]["lowest_loss"] is None


def test_a_terminated_run_says_so(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise SIGTERMException

    with pytest.raises(SystemExit) as stop:
        guarded(main, "its last checkpoint")
    assert stop.value.code == 143
    assert "the same command goes on from its last checkpoint" in capsys.readouterr().err


def test_deepspeed_clips_all_layers_together_and_mp_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    monkeypatch.setattr(DistillationModule, "check_trainer", lambda self, trainer: None)
    for strategy, value, warned in ((DeepSpeedStrategy, 1.0, 1), (DeepSpeedStrategy, None, 0), (DDPStrategy, 1.0, 0)):
        trainer = SimpleNamespace(gradient_clip_val=value, strategy=object.__new__(strategy))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            CoMeMP().check_trainer(trainer)
        assert len(told) == warned and all("clips the gradients of all layers together" in str(t.message) for t in told)


@pytest.mark.parametrize("module", [lambda w: KD(label_weight=w), lambda w: Hybrid(state_weight=0, label_weight=w)])
def test_label_weight_goes_from_the_teacher_to_the_text(module: Any) -> None:
    batch = batch_of(padded=3)
    value = {w: float(sum(attached(module(w)).losses(batch).values())) for w in (0.0, 0.25, 1.0)}
    assert value[0.25] == pytest.approx(0.75 * value[0.0] + 0.25 * value[1.0], rel=1e-5)
    assert value[1.0] == pytest.approx(float(attached(LM()).losses(batch)["lm"]), rel=1e-5)
    with pytest.raises(ValueError, match="label_weight 0.5 is a share of logit_weight, which is 0"):
        CoMeSP(label_weight=0.5)
    with pytest.raises(ValueError, match="label_weight 1.5: expected a share from 0 to 1"):
        module(1.5)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_length", lambda batch, vocabulary: 4)
    seen = []
    real = losses._Head.logits
    monkeypatch.setattr(losses._Head, "logits", lambda self, h, w, b: (seen.append(h.shape[1]), real(self, h, w, b))[1])
    module = attached(KD())
    sum(module.losses(batch_of()).values()).backward()
    assert seen and max(seen) == 4


# -- learning rates ---------------------------------------------------------------------------------------------------


def test_published_lists_and_their_interpolation() -> None:
    assert learning_rates("llama2-7b", [3, 5, 8, 9, 11, 12, 20])[8] == 1e-4
    five = by_depth(PRESETS["llama2-7b"], 5)
    assert (five[0], five[-1]) == pytest.approx((5e-4, 1e-5)) and five == sorted(five, reverse=True)
    assert by_depth([1e-2, 1e-4], 3) == pytest.approx([1e-2, 1e-3, 1e-4])  # geometric
    assert learning_rates({1: 1e-3, 4: 1e-4}, [1, 4]) == {1: 1e-3, 4: 1e-4}
    for bad in ("llama9", [], -1.0, {1: 1e-3}, [1e-3, 0.0]):
        with pytest.raises(BadRate):
            learning_rates(bad, [1, 4])  # type: ignore[arg-type]


def test_cosine_with_warm_up() -> None:
    shares = [cosine(s, 100, 10, 0.1) for s in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[10] == 1.0
    assert shares[100] == pytest.approx(0.1) and shares[55] == pytest.approx(0.55)


# -- CoMe-mp ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "gemma3", "opt"])
def test_mp_layer_reads_the_teacher_and_aims_at_the_end_of_its_group(family: str) -> None:
    module = attached(CoMeMP(), family)
    batch = batch_of(padded=2)
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in module.teacher.layers]
    with torch.no_grad():
        module.teacher.run(batch["input_ids"], batch["mask"].long())
        for hook in hooks:
            hook.remove()
        found = module.losses(batch)
        # student layer 1 is the teacher's layer 1: given the teacher's stream it gives the teacher's next state
        for name, (output, target) in {"layer 1": (states[1], states[2]), "layer 3": (states[4], states[5])}.items():
            torch.testing.assert_close(found[name], losses.state_loss(output, target, batch["mask"]))


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_mp_gradient_of_a_layer_does_not_depend_on_others(inputs: Any) -> None:
    module = attached(CoMeMP(inputs=inputs))
    found = module.losses(batch_of())
    found["layer 3"].backward()
    assert all(p.grad is None for p in module.student.layers[1].parameters())
    assert all(p.grad is not None for p in module.student.layers[3].parameters())
    assert all(p.grad is None for i in (0, 2) for p in module.student.layers[i].parameters())


def test_mp_teacher_stops_at_the_last_boundary_and_student_never_runs_whole() -> None:
    teacher = tiny_model(layers=6)
    student = copy.deepcopy(teacher)
    for index in (4, 2):
        drop(Decoder(student), index)
    module = CoMeMP()
    module.attach(teacher, student, [[0], [1, 2], [3, 4], [5]])
    calls: list[str] = []
    for which, decoder in (("teacher", module.teacher), ("student", module.student)):
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(lambda m, a, w=which, i=index: calls.append(f"{w} {i}"))
    heads = [m.get_output_embeddings() for m in (teacher, student)]
    for head in heads:
        head.register_forward_pre_hook(lambda m, a: calls.append("logits"))
    module.losses(batch_of())
    assert calls == [f"teacher {i}" for i in range(5)] + ["student 1", "student 2"]


@pytest.mark.parametrize(
    ("inputs", "adapted", "own"),
    [("auto", True, True), ("auto", False, False), ("teacher", True, False), ("student", False, True)],
)
def test_mp_reads_the_own_stream_of_a_student_that_was_fitted_to_it(inputs: Any, adapted: bool, own: bool) -> None:
    module = CoMeMP(inputs=inputs)
    module.attach(*pruned_pair(), GROUPS, adapted=adapted)
    ran: list[tuple[int, bool]] = []
    for index, layer in enumerate(module.student.layers):
        layer.register_forward_hook(lambda m, a, out, i=index: ran.append((i, stream_from(out).requires_grad)))
    module.losses(batch_of())
    # those that do not learn keep nothing for a backward
    assert ran == ([(i, i in (1, 3)) for i in range(4)] if own else [(1, True), (3, True)])


@pytest.mark.parametrize(
    ("info", "adapted"),
    [
        ({}, False),
        ({"refit": {"parts": "none"}}, False),
        ({"refit": {"parts": "down"}}, True),
        ({"student": {"run": "pruned"}}, True),
    ],
)
def test_a_repaired_or_trained_student_is_known_as_such(info: dict[str, Any], adapted: bool, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    made = info | {"model": {"path": "dense", "layers": 6}, "groups": GROUPS, "status": "finished"}
    (tmp_path / "run.json").write_text(json.dumps(made))
    assert read_pruned(str(tmp_path)).adapted == adapted


def test_sp_reaches_layers_below_and_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = attached(CoMeSP(logit_weight=0.5, activation_checkpointing=checkpointing))
        found = module.losses(batch_of(padded=2))
        assert list(found) == ["layer 1", "layer 3", "logits"]
        found["layer 3"].backward(retain_graph=True)
        assert all(p.grad is not None for p in module.student.layers[1].parameters())
        sum(found.values()).backward()
        gradients.append([p.grad for p in module.student.layers[1].parameters()])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(plain, again)


def test_a_perfect_student_has_no_loss() -> None:
    teacher = tiny_model(layers=4)
    for module in (CoMeSP(logit_weight=1.0, match="all"), KD(), Hybrid(label_weight=0)):
        student = copy.deepcopy(teacher)
        module.groups = [[0], [1], [2], [3]]
        module.merged = [1, 2]
        module.teacher, module.student, module.student_model = Decoder(teacher), Decoder(student), student
        assert float(sum(module.losses(batch_of()).values())) == pytest.approx(0.0, abs=1e-5)


def test_nothing_merged_is_refused() -> None:
    teacher = tiny_model()
    with pytest.raises(NothingToTrain):
        CoMeMP().attach(teacher, copy.deepcopy(teacher), [[0], [1], [2], [3]])


def test_teacher_is_hidden_and_only_what_learns_is_checkpointed() -> None:
    module = attached(CoMeMP())
    assert not any("teacher" in name for name, _ in module.named_parameters())
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert {k.split(".")[3] for k in checkpoint["state_dict"]} == {"1", "3"}
    assert {n.split(".")[3] for n, p in module.named_parameters() if p.requires_grad} == {"1", "3"}


@pytest.mark.parametrize("method", ["kd", "lora"])
def test_of_a_model_that_also_sees_only_the_text_learns(method: str, tmp_path: Path) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    teacher, folder = seeing_model(layers=6), tmp_path / "run"
    student = copy.deepcopy(teacher)
    for index in (5, 2):
        drop(Decoder(student), index)
    run = Run(folder, {})
    for model, place in ((teacher, tmp_path / "teacher"), (student, folder / "model")):
        model.save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
    tiny_text(tmp_path / "text.txt")
    made = {"model": {"path": str(tmp_path / "teacher"), "layers": 6, "dtype": "float32"}, "groups": GROUPS}
    run.update(**made, status="finished")
    module = KD(lr=1e-2) if method == "kd" else LoRA(lr=1e-2, r=2)
    idle: list[str] = []

    def look(*ignored: Any) -> None:
        named = module.student_model.named_parameters()
        idle.extend(name for name, p in named if p.requires_grad and p.grad is None)

    module.on_before_optimizer_step = look
    start(tmp_path, tmp_path / "o", module, method=method, samples=False)
    assert idle == []  # which several devices would wait for
    before, after = student.state_dict(), load_model(str(tmp_path / "o" / "model")).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and before.keys() == after.keys()
    assert all("language_model" in name or name == "lm_head.weight" for name in changed)


def test_lora_merged_equals_the_adapted_model() -> None:
    pytest.importorskip("peft")
    module = attached(LoRA(r=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.student_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        ids = tiny_ids()
        adapted = module.student_model(ids).logits
        names = {g["name"]: len(g["params"]) for g in module.parameter_groups()}
        module.finish()
        torch.testing.assert_close(module.student_model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert names == {"layer 1": 14, "layer 3": 14, "others": 28}
    plain = set(pruned_pair()[1].state_dict())
    assert set(module.student_model.state_dict()) == plain


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as prune.py leaves it, beside its teacher and texts."""
    folder = tmp_path_factory.mktemp("distil")
    teacher = save_tiny(folder / "teacher", layers=6)
    tiny_text(folder / "text.txt", words=6000)
    _, student = pruned_pair()
    run = Run(folder / "run", {})
    student.save_pretrained(folder / "run" / "model")
    tiny_tokenizer().save_pretrained(folder / "run" / "model")
    run.update(model={"path": teacher, "layers": 6, "dtype": "float32"}, groups=GROUPS, status="finished")
    return folder


ABOVE = [[0], [1, 2], [3, 4], [5]]  # a layer above the last merged one


@pytest.fixture(scope="module")
def above(student_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `student_run`, but that layers 2 and 4 were dropped."""
    folder = tmp_path_factory.mktemp("above") / "home"
    shutil.copytree(student_run, folder)
    student = tiny_model(layers=6)
    for index in (4, 2):
        drop(Decoder(student), index)
    student.save_pretrained(folder / "run" / "model")
    Run(folder / "run", {}).update(groups=ABOVE, model={"path": str(folder / "teacher"), "layers": 6})
    return folder


def start(
    folder: Path,
    output: Path,
    module: Any,
    *,
    tokens: int = 512,
    trainer: Any = None,
    streaming: bool = False,
    **over: Any,
) -> Path:
    data = DistillationData(str(folder / "text.txt"), tokens, 16, 4, validation_tokens=64, streaming=streaming)
    options = {"max_epochs": 1, "gradient_clip_val": 1.0} | (trainer or {})
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    evaluation = EvaluationText([str(folder / "text.txt")], 256)
    name = over.pop("method", "mp")
    kwargs = {"student": str(folder / "run"), "evaluation": evaluation, "save_every": 2} | over
    result = distil(module, data, trainer, method=name, options={}, output=output, **kwargs)
    assert result is not None
    return result


def curve(output: Path, name: str = "curves.csv") -> list[dict[str, float]]:
    with open(output / name) as opened:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(opened)]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("mp", lambda: CoMeMP(lr=5e-3)),
        ("sp", lambda: CoMeSP(lr=5e-3)),
        ("kd", lambda: KD(lr=5e-3)),
        ("lm", lambda: LM(lr=5e-3)),
        ("lora", lambda: LoRA(lr=2e-2)),
        ("hybrid", lambda: Hybrid(lr=5e-3, second_lr=5e-3)),
    ],
)
def test_every_method_learns_and_saves_a_stock_model(name: str, module: Any, student_run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if name == "lora":
        pytest.importorskip("peft")
    output = start(student_run, tmp_path / name, module(), tokens=2048, method=name)
    info = json.loads((output / "run.json").read_text())
    assert info["status"] == "finished" and info["tokens_seen"] == 2048 and info["tokens_per_second"] > 0
    student = pruned_pair()[1]
    each = sum(p.numel() for p in student.model.layers[1].parameters())
    sums = [sum(m.weight.shape) for n, m in student.model.layers.named_modules() if n.endswith("_proj")]
    whole = sum(p.numel() for p in student.parameters())
    counts = {"mp": 2 * each, "sp": 2 * each, "lora": 16 * sum(sums)}  # rank 16: A and B of each projection
    assert info["trained_parameters"] == counts.get(name, whole)
    entry = info["perplexity"][str(student_run / "text.txt")]
    assert {"dense", "before", "after"} <= entry.keys()
    rows = curve(output)
    first, last = rows[0]["loss"], sum(r["loss"] for r in rows[-3:]) / 3
    if name not in ("hybrid", "lm", "lora"):  # random words teach a language model nothing
        assert last < first
    model, loaded = AutoModelForCausalLM.from_pretrained(output / "model", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert model.config.num_hidden_layers == 4
    before = pruned_pair()[1].state_dict()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    layers = {k.split(".")[2] for k in changed if ".layers." in k}
    assert layers == ({"1", "3"} if name in ("mp", "sp") else {"0", "1", "2", "3"})
    assert (output / "distill.png").stat().st_size > 1000 and (output / "model" / "README.md").is_file()


def test_rates_after_warm_up_and_at_the_end(student_run: Path, tmp_path: Path) -> None:
    seen: dict[int, dict[str, float]] = {}

    class Watched(CoMeMP):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            groups = self.trainer.optimizers[0].param_groups
            seen[self.global_step] = {g["name"]: g["lr"] for g in groups}
            assert [g["weight_decay"] for g in groups] == [1e-2, 1e-2]

    start(student_run, tmp_path / "o", Watched(lr=[1e-3, 1e-5], warmup=0.25))
    assert seen[2] == pytest.approx({"layer 1": 1e-3, "layer 3": 1e-5})  # the third of 8 steps, 2 of warm-up
    expected = cosine(7, 8, 2, 0.0)
    assert seen[7] == pytest.approx({"layer 1": 1e-3 * expected, "layer 3": 1e-5 * expected})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def test_one_layer_after_another_gives_what_all_at_once_gives(student_run: Path, tmp_path: Path) -> None:
    joint = start(student_run, tmp_path / "joint", CoMeMP(lr=1e-3))
    module = CoMeMP(lr=1e-3, schedule="sequential")
    held: list[int] = []
    whole = module._enter

    def enter(phase: int) -> None:
        whole(phase)
        held.append(len(module.trainer.optimizers[0].state))

    module._enter = enter  # type: ignore[method-assign]
    sequential = start(student_run, tmp_path / "sequential", module)
    one_layer = len(list(module.student.layers[1].parameters()))
    assert max(held) <= one_layer  # optimizer state of one layer at a time
    for (name, a), b in zip(weights(joint).items(), weights(sequential).values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("streaming", [False, True])
def test_resumed_run_has_the_curve_of_an_uninterrupted_one(streaming: bool, student_run: Path, tmp_path: Path) -> None:
    """With a validation due at the very step of the checkpoint: neither left out nor twice in the curve."""
    how: Any = {"streaming": streaming, "trainer": {"val_check_interval": 2, "max_epochs": 2}}
    whole = start(student_run, tmp_path / "whole", CoMeMP(lr=1e-3), **how)

    class Dies(CoMeMP):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 13:  # the second epoch's fifth
                raise Killed
            return super().training_step(batch, batch_idx)

    with pytest.raises(Killed):
        start(student_run, tmp_path / "cut", Dies(lr=1e-3), **how)
    assert len(curve(tmp_path / "cut")) == 13  # step 13 is in the curve, the checkpoint is of step 12
    again = start(student_run, tmp_path / "cut", CoMeMP(lr=1e-3), resume=True, **how)
    assert curve(again) == curve(whole)
    validations = curve(again, "validation.csv")
    assert validations == curve(whole, "validation.csv") and [r["step"] for r in validations] == [*range(2, 17, 2)]
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(whole).values()))


def test_a_layers_turn_that_is_resumed_reads_the_same_windows(student_run: Path, tmp_path: Path) -> None:
    """The second of two layers reads what the first has read, in the same order; cut in the fourth step of its turn."""
    read: dict[Path, list[torch.Tensor]] = {}

    class Watched(CoMeMP):
        dies_at = -1

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == self.dies_at:
                raise Killed
            read.setdefault(output, []).append(batch["input_ids"])
            return super().training_step(batch, batch_idx)

    def run(dies_at: int = -1) -> None:
        module = Watched(lr=1e-3, schedule="sequential")
        module.dies_at = dies_at
        start(student_run, output, module)

    output = tmp_path / "cut"
    with pytest.raises(Killed):
        run(11)
    assert (output / "checkpoints" / "step=10.ckpt").exists()
    del read[output][10:]
    run()
    output = tmp_path / "whole"
    run()
    windows = torch.stack(read[output])
    assert torch.equal(windows[:8], windows[8:])
    assert torch.equal(torch.stack(read[tmp_path / "cut"]), windows)
    losses = [[row["loss"] for row in curve(folder)] for folder in (tmp_path / "cut", output)]
    assert losses[0] == losses[1]


def test_the_last_weights_are_validated(student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where max_steps ends the run between two validations, and after a kill in the last validation or after."""
    from come_pl.workflows import distil as workflow

    how: Any = {"trainer": {"val_check_interval": 4, "max_steps": 6}}
    output = start(student_run, tmp_path / "whole", CoMeMP(lr=1e-3), **how)
    rows = curve(output, "validation.csv")
    assert [row["step"] for row in rows] == [4, 6] and rows[1]["val_loss"] < rows[0]["val_loss"]
    told = json.loads((output / "run.json").read_text())["validation"]
    assert (told["kept_step"], told["of_step"]) == (6, 6)

    class Dies(CoMeMP):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 6:
                raise Killed
            super().validation_step(batch, batch_idx)

    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        start(student_run, cut, Dies(lr=1e-3), **how)
    assert (cut / "checkpoints" / "step=4.ckpt").exists()
    never = tmp_path / "never"
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "rebuilt", lambda *a: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            start(student_run, cut, CoMeMP(lr=1e-3), **how)
        with pytest.raises(Killed):
            start(student_run, never, CoMeMP(), trainer={"limit_val_batches": 0, "max_steps": 6})
    assert all((folder / "checkpoints" / "step=6.ckpt").exists() for folder in (cut, never))
    assert not (never / "validation.csv").exists()
    start(student_run, cut, Dies(lr=1e-3), **how)  # all is known
    assert curve(cut, "validation.csv") == rows and curve(cut) == curve(output)
    assert json.loads((cut / "run.json").read_text())["validation"] == told
    assert all(torch.equal(a, b) for a, b in zip(weights(cut).values(), weights(output).values()))


def test_what_decides_the_result_is_told_apart(student_run: Path, tmp_path: Path) -> None:
    """A trial with fewer batches, a student or a text that was replaced: none is the run that was finished."""
    from safetensors.torch import save_file

    home, output = tmp_path / "home", tmp_path / "o"
    shutil.copytree(student_run, home)
    how: Any = {"trainer": {"limit_train_batches": 1}}
    start(home, output, CoMeMP(), samples=False, **how)
    start(home, output, CoMeMP(), **how)  # finished already
    for other in ({"limit_train_batches": 1.0}, {"val_check_interval": 0.5}, {"limit_val_batches": 1}, {"max_time": 9}):
        given = {"max_time": {"seconds": 9}} if "max_time" in other else other
        with pytest.raises(RunError, match="holds another run"):
            start(home, output, CoMeMP(), trainer=how["trainer"] | given)
    text = (home / "text.txt").read_text()
    (home / "text.txt").write_text(text.replace("w7", "w8"))
    with pytest.raises(RunError, match="windows of the text are not those"):
        start(home, output, CoMeMP(), **how)
    (home / "text.txt").write_text(text)
    file = home / "run" / "model" / "model.safetensors"
    save_file({name: 1.5 * value for name, value in weights(home / "run").items()}, file, {"format": "pt"})
    with pytest.raises(RunError, match="weights of the student are not those"):
        start(home, output, CoMeMP(), **how)


def test_another_teacher_is_measured(student_run: Path, tmp_path: Path) -> None:
    """The dense perplexity that pruning knows is that of its own teacher."""
    shutil.copytree(student_run / "run", tmp_path / "run")
    (tmp_path / "text.txt").write_text((student_run / "text.txt").read_text())
    entry = {"tokens": 240, "seqlen": 16, "dense": 1.25, "pruned": 1.5}
    Run(tmp_path / "run", {}).update(perplexity={str(tmp_path / "text.txt"): entry})
    other = save_tiny(tmp_path / "other", layers=6, seed=7)
    for name, teacher in (("own", None), ("another", other)):
        how: Any = {"teacher": teacher, "samples": False, "trainer": {"max_steps": 1}}
        output = start(tmp_path, tmp_path / name, CoMeMP(), **how)
        found = json.loads((output / "run.json").read_text())["perplexity"][str(tmp_path / "text.txt")]
        assert found["before"] == 1.5 and (found["dense"] == 1.25) == (teacher is None)


class Scripted(CoMeMP):
    """Its validation losses are told beforehand, one for every two steps."""

    script = (0.9, 0.5, 0.7, 0.8, 0.1, 0.1, 0.1, 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(self.script[self.global_step // 2 - 1]), batch_size=4)


@pytest.mark.parametrize("cut_at", [None, 5, 7, "result"])
def test_patience_keeps_the_best_weights_across_a_kill(
    cut_at: int | str | None, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowest at step 4, then twice higher: stopped after step 8 of 16."""
    from come_pl.workflows import distil as workflow

    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Watched(Scripted):
        def on_train_batch_end(self, *args: Any) -> None:
            seen[self.global_step] = {k: v.detach().clone() for k, v in self.student_model.state_dict().items()}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == cut_at and not (tmp_path / "cut").exists():
                (tmp_path / "cut").touch()
                raise Killed
            return super().training_step(batch, batch_idx)

    how: Any = {"tokens": 1024, "patience": 2, "trainer": {"val_check_interval": 2}}
    if cut_at == "result":
        with monkeypatch.context() as patch:
            patch.setattr(workflow, "rebuilt", lambda *a: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                start(student_run, tmp_path / "o", Watched(lr=1e-3), **how)
    elif cut_at is not None:
        with pytest.raises(Killed):
            start(student_run, tmp_path / "o", Watched(lr=1e-3), **how)
    output = start(student_run, tmp_path / "o", Watched(lr=1e-3), **how)
    info = json.loads((output / "run.json").read_text())
    assert info["steps"] == max(seen) == 8
    assert info["validation"] == {
        "stopped_early": True,
        "kept_step": 4,
        "lowest_loss": pytest.approx(0.5),
        "of_step": 4,
    }
    kept = weights(output)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(kept[name], seen[4][name]) and not torch.equal(kept[name], seen[8][name])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("name", "module", "teacher_layers", "student_layers"),
    [
        ("mp", lambda: CoMeMP(lr=1e-3), 5, 2),  # of the student the merged ones, the rest is the teacher's
        ("sp", lambda: CoMeSP(lr=1e-3, logit_weight=0.5), 6, 2),
        ("lm", lambda: LM(lr=1e-3), 0, 4),
        ("kd", lambda: KD(lr=1e-3), 6, 4),
    ],
)
def test_memory_holds_what_is_run_once(
    name: str,
    module: Any,
    teacher_layers: int,
    student_layers: int,
    precision: str,
    above: Path,
    tmp_path: Path,
) -> None:
    """Bytes of distinct storages in the middle of a run, against a count by hand and against the plan."""
    from come_pl.distillation.plan import GIB, memory_plan
    from come_pl.models import on_meta

    watched = module()
    held: dict[int, int] = {}

    def look(*ignored: Any) -> None:
        tensors = [*watched.teacher.model.parameters(), *watched.student_model.parameters()]
        held.update((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors)

    watched.on_train_start = look
    start(above, tmp_path / name, watched, tokens=64, method=name, trainer={"precision": precision})
    teacher, student = pruned_pair()
    layer, table = (sum(p.numel() for p in part.parameters()) for part in (teacher.model.layers[0], teacher.lm_head))
    norm = 32
    if precision == "32-true":
        tables = {"mp": 1, "sp": 2, "lm": 2, "kd": 4}[name]
        norms = 2 if name in ("lm", "kd") else 1
        layers = teacher_layers + student_layers
        assert sum(held.values()) == 4 * (layers * layer + tables * table + norms * norm)
    planned = module()
    planned.attach(on_meta(teacher.config), on_meta(student.config), ABOVE)
    sizes = {"strategy": "auto", "devices": 1, "batch_size": 4, "seqlen": 16}
    plan = memory_plan(planned, precision=precision, **sizes)  # type: ignore[arg-type]
    assert (plan.teacher + plan.student) * GIB == pytest.approx(sum(held.values()))
    elsewhere = {o: memory_plan(planned, precision=precision, offload=o, **sizes) for o in ("disk", "cpu")}  # type: ignore[arg-type]
    away = [p for part in planned.teacher.layers for p in part.parameters() if p.dim() >= 2]
    size = sum(p.numel() * p.element_size() for p in away)
    assert elsewhere["cpu"].host * GIB == pytest.approx(size) and elsewhere["disk"].host == 0
    kept = sum(p.numel() * p.element_size() for p in planned.teacher.model.parameters()) - size
    largest = max((p.numel() * p.element_size() for p in away), default=0)
    for offloaded in elsewhere.values():
        assert (offloaded.teacher + offloaded.shared) * GIB == pytest.approx(kept + largest)
        assert offloaded.student == plan.student
    if name == "mp":
        whole = sum(p.numel() for model in (teacher, student) for p in model.parameters())
        assert (plan.teacher + plan.student + plan.optimizer) * GIB < 4 * whole + plan.optimizer * GIB


def test_patience_is_refused_where_it_would_end_other_layers(student_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="before all layers had their turn"):
        start(student_run, tmp_path / "o", CoMeMP(schedule="sequential"), patience=2)
    with pytest.raises(ValueError, match="patience 0"):
        start(student_run, tmp_path / "o", CoMeMP(), patience=0)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("how", ["loss", "gradient", "explosion"])
def test_divergence_names_the_layer_and_keeps_good_weights(how: str, student_run: Path, tmp_path: Path) -> None:
    class Breaks(CoMeMP):
        def losses(self, batch: Any) -> dict[str, torch.Tensor]:
            found = super().losses(batch)
            if self.global_step == 5:
                scale = {"loss": math.nan, "explosion": 1e4}.get(how, 1.0)
                found["layer 3"] = found["layer 3"] * scale
                if how == "gradient":
                    found["layer 3"].register_hook(lambda g: g * math.nan)
            return found

    with pytest.raises(Diverged, match=r"layer 3 \(teacher layers 4\+5\).*step 5.*last good weights.*step=4"):
        start(student_run, tmp_path / "o", Breaks(lr=1e-3))
    saved = torch.load(next((tmp_path / "o" / "checkpoints").glob("step=*.ckpt")), weights_only=True)
    assert all(bool(torch.isfinite(v).all()) for v in saved["state_dict"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 7}, "layers of the dense model is 6 .* 7"),
        ({"hidden_size": 40}, "hidden_size is 32 .* 40"),
        ({"vocab_size": 99}, "vocab_size is 97 .* 99"),
    ],
)
def test_a_student_of_another_teacher_is_refused(
    change: dict[str, int], message: str, student_run: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", **({"layers": 6} | change))
    with pytest.raises(Misfit, match=message):
        start(student_run, tmp_path / "o", CoMeMP(), teacher=other)


def test_another_tokenizer_is_refused(student_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(student_run / "teacher", other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(Misfit, match="id of 'w5' is 8 for the student, 9 for the teacher"):
        start(student_run, tmp_path / "o", CoMeMP(), teacher=str(other))


def test_hybrid_trains_merged_layers_first(student_run: Path, tmp_path: Path) -> None:
    seen: dict[int, set[int]] = {}

    class Watched(Hybrid):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            before = [p.detach().clone() for la in self.student.layers for p in la.parameters()]
            step = self.global_step
            super().optimizer_step(*args, **kwargs)
            after = [p for la in self.student.layers for p in la.parameters()]
            each = len(after) // 4
            seen[step] = {i // each for i, (a, b) in enumerate(zip(before, after)) if not torch.equal(a, b)}

    start(student_run, tmp_path / "o", Watched(merged_first=0.5), method="hybrid")
    assert seen[1] == seen[3] == {1, 3} and seen[4] == seen[7] == {0, 1, 2, 3}


def test_layers_that_wait_do_not_clip_those_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on several devices, where all layers have gradients from the first step on."""
    module = attached(Hybrid(merged_first=0.5))
    module.total_steps = 10
    groups = module.parameter_groups()
    optimizer = torch.optim.AdamW(groups)
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(precision="32-true"))
    found = []
    for step in (4, 5):
        monkeypatch.setattr(Hybrid, "global_step", step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
            group["params"][0].grad.view(-1)[0] = 3.0 if group["name"].startswith("layer") else 300.0
        module.configure_gradient_clipping(optimizer, 5.0)  # the merged layers' norm is 3 · √2, that of all is 424
        found.append({g["name"]: [float(p.grad.sum()) for p in g["params"][:1] if p.grad is not None] for g in groups})
    whole = 5 / math.sqrt(2 * 3**2 + 2 * 300**2)
    first, second = found
    assert first == {"layer 1": [3.0], "layer 3": [3.0], "others": [], "embeddings and norm": []}
    assert second["layer 1"] == pytest.approx([3 * whole], rel=1e-4)
    assert second["others"] == pytest.approx([300 * whole], rel=1e-4)
