"""`train.py` as a user runs it: errors, plans, configs, several processes, kills."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli import ENVIRONMENT, ROOT, exit_code, is_one_line, kill_when, run
from conftest import save_tiny, tiny_text
from safetensors.torch import load_file
from test_distillation import GROUPS, pruned_pair

from come_pl.cli.train import train_main
from come_pl.distillation.comparisons import KD
from come_pl.distillation.curves import read_rows
from come_pl.runs import Run, RunError

CONFIGS = sorted([*(ROOT / "configs").glob("distill_*.yaml"), *(ROOT / "configs").glob("scale_*.yaml")])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned run (`run`), its teacher and a text."""
    from conftest import tiny_tokenizer

    folder = tmp_path_factory.mktemp("train")
    teacher = save_tiny(folder / "teacher", layers=6)
    tiny_text(folder / "text.txt", words=6000)
    made = Run(folder / "run", {})
    pruned_pair()[1].save_pretrained(folder / "run" / "model")
    tiny_tokenizer().save_pretrained(folder / "run" / "model")
    made.update(model={"path": teacher, "layers": 6, "dtype": "float32"}, groups=GROUPS, status="finished")
    return folder


def flags(output: Path, *more: object, batch: int = 4) -> list[object]:
    """64 tokens a step, 32 steps, in fp32."""
    return [
        *("--student", "run", "--output", output, "--data.source", "text.txt", "--data.tokens", 2048),
        *("--data.seqlen", 16, "--data.batch_size", batch, "--data.validation_tokens", 64),
        *("--evaluation.data", "text.txt", "--evaluation.tokens", 256, "--save_every", 4),
        *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--distill", "mp", "--model.lr", "[1e-3, 1e-4]", *more),
    ]


def curve(output: Path) -> list[dict[str, float]]:
    with open(output / "curves.csv") as opened:
        return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(opened)]


def started(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """`train.py` in this process, which is faster; its exit code."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return exit_code(train_main, "train.py", *words, monkeypatch=monkeypatch)


def trained(home: Path, output: Path, *more: object, batch: int = 4) -> dict[str, Any]:
    """What a run ends with: of several devices in processes of their own, of one in this process."""
    words = flags(output, *more, batch=batch)
    if "--trainer.devices" in more:
        done = run("train.py", *words, cwd=home)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.chdir(home)
            assert started(monkeypatch, *words) == 0
    return load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def single(home: Path) -> Path:
    trained(home, home / "single")
    return home / "single"


def same(a: dict[str, Any], folder: Path, tolerance: float) -> None:
    for name, value in load_file(folder / "model" / "model.safetensors").items():
        assert (a[name] - value).abs().max() <= tolerance, name


def test_what_is_read_and_what_is_there_outlive_overwrite(
    home: Path, single: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(home)
    assert started(monkeypatch, *flags(Path("run"), "--overwrite")) == 2
    assert is_one_line(capsys.readouterr().err, "output folder 'run' is what --student reads; give another --output")
    before = (single / "run.json").read_text()
    monkeypatch.setattr("come_pl.models.load_model", lambda *a, **k: (_ for _ in ()).throw(RunError("for a test")))
    assert started(monkeypatch, *flags(single, "--overwrite")) == 2
    assert (home / "run" / "model").is_dir() and (single / "run.json").read_text() == before
    assert (single / "model" / "model.safetensors").is_file()


def test_bfloat16_leaves_rotary_tables_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[Any, Any]] = set()

    def watched(self: Any, batch: Any) -> Any:
        seen.add(tuple(d.base.rotary_emb.inv_freq.dtype for d in (self.teacher, self.student)))
        assert {d.layers[0].mlp.up_proj.weight.dtype for d in (self.teacher, self.student)} == {torch.bfloat16}
        return losses(self, batch)

    losses = KD.losses
    monkeypatch.setattr(KD, "losses", watched)
    monkeypatch.chdir(home)
    more = ("--distill", "kd", "--trainer.max_steps", 1, "--trainer.precision", "bf16-true", "--samples", "false")
    assert started(monkeypatch, *flags(home / "bf16", *more, "--model.lr", 1e-3)) == 0
    assert seen == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("native", [True, False])
def test_precision_is_the_processors(home: Path, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: emulated products in bfloat16 take ten times as long as those in fp32."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("come_pl.cli.common.multiplies_bfloat16", lambda: native)
    output = home / f"native_{native}"
    words = flags(output, "--trainer.max_steps", 1, "--samples", "false")
    at = words.index("--trainer.precision")
    assert started(monkeypatch, *words[:at], *words[at + 2 :]) == 0
    found = json.loads((output / "run.json").read_text())["identity"]["trainer"]["precision"]
    assert found == ("bf16-mixed" if native else "32-true")


def test_going_on_with_another_text_to_measure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "other.txt").write_text((home / "text.txt").read_text())
    monkeypatch.chdir(home)
    output = home / "texts"
    with monkeypatch.context() as stopped:
        stopped.setattr("come_pl.workflows.distil.rebuilt", lambda *a: (_ for _ in ()).throw(RunError("for a test")))
        assert started(monkeypatch, *flags(output)) == 2
    words = flags(output)
    at = words.index("--evaluation.data")
    words[at : at + 4] = ["--evaluation.data", "text.txt", "other.txt", "--evaluation.tokens", 64]
    assert started(monkeypatch, *words) == 0
    found = json.loads((output / "run.json").read_text())["perplexity"]
    assert list(found) == ["text.txt", "other.txt"] and found["text.txt"] == found["other.txt"]
    assert found["text.txt"]["tokens"] == 60 and {"dense", "before", "after"} <= found["text.txt"].keys()


def test_kill_and_the_same_command_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A corpus that is streamed, validated four times, with an early stop in waiting."""
    more = ("--data.streaming", "true", "--patience", 3, "--trainer.val_check_interval", 0.25)
    whole, output = home / "streamed", home / "killed"
    trained(home, whole, *more)
    command = flags(output, *more)

    def halfway() -> bool:
        found = list((output / "checkpoints").glob("step=*.ckpt"))
        return bool(found) and (output / "curves.csv").is_file() and len(curve(output)) >= 9

    kill_when(halfway, "train.py", *command, cwd=home)
    assert not (output / "model").exists()
    monkeypatch.chdir(home)
    assert started(monkeypatch, *flags(output, "--patience", 3, "--resume")) == 2
    assert "streaming is True there" in capsys.readouterr().err
    same(trained(home, output, *more, "--resume"), whole, 0)
    assert curve(output) == curve(whole)
    assert (output / "validation.csv").read_text() == (whole / "validation.csv").read_text()
    told, expected = (json.loads((folder / "run.json").read_text())["validation"] for folder in (output, whole))
    assert told == expected


def same_curve(folder: Path, other: Path) -> None:
    assert [r["layer 1"] for r in curve(folder)] == pytest.approx([r["layer 1"] for r in curve(other)], rel=1e-4)


def test_a_process_without_a_window_to_validate_waits_for_nobody(home: Path) -> None:
    """One window for two processes; the last of 6 steps is validated too, on both."""
    more = ("--data.validation_tokens", 16, "--trainer.max_steps", 6, "--trainer.val_check_interval", 4)
    trained(home, home / "window", *more, "--samples", "false")
    parts = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    same(trained(home, home / "windows", *more, *parts, "--samples", "false", batch=2), home / "window", 2e-5)
    found = [read_rows(home / name / "validation.csv") for name in ("window", "windows")]
    assert [[row["step"] for row in rows] for rows in found] == [[4, 6], [4, 6]]
    assert [row["val_loss"] for row in found[0]] == pytest.approx([row["val_loss"] for row in found[1]], rel=1e-4)


def test_two_shards_give_what_one_process_gives(home: Path, single: Path) -> None:
    weights = trained(home, home / "fsdp", "--trainer.devices", 2, "--trainer.strategy", "fsdp", batch=2)
    same(weights, single, 1e-5)
    same_curve(home / "fsdp", single)


RATES = """
import json, sys
from pathlib import Path
sys.argv[1:] = {arguments!r}
from come_pl.cli import train
from come_pl.distillation.layerwise import CoMeMP
seen = {{}}
def on_train_batch_end(self, *a, **k):
    groups = self.trainer.optimizers[0].param_groups
    seen[self.global_step] = [[g["name"], g["lr"]] for g in groups]
    if self.trainer.is_global_zero:
        Path({file!r}).write_text(json.dumps(seen))
CoMeMP.on_train_batch_end = on_train_batch_end
train.train_main()
"""


@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_each_layer_keeps_its_rate_and_two_processes_give_what_one_gives(
    strategy: str, home: Path, single: Path, tmp_path: Path
) -> None:
    if not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install 'come_pl[deepspeed]'")
    from come_pl.cli.common import normalise
    from come_pl.cli.train import ALIASES, LISTS, SWITCHES
    from come_pl.distillation.rates import cosine

    output, seen = home / f"rates_{strategy}", tmp_path / "seen.json"
    more = ("--trainer.devices", 2, "--trainer.strategy", strategy, "--distill", "mp")
    words = [str(w) for w in flags(output, *more, batch=2)]
    script = tmp_path / "script.py"
    script.write_text(RATES.format(arguments=normalise(words, ALIASES, SWITCHES, LISTS), file=str(seen)))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=home, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rates = {int(k): dict(v) for k, v in json.loads(seen.read_text()).items()}
    share = lambda step: cosine(step, 32, 2, 0.0)  # noqa: E731
    # a scheduler has been stepped once when a batch has ended
    for step in (2, 16, 32):
        expected = {"layer 1": 1e-3 * share(step), "layer 3": 1e-4 * share(step)}
        assert rates[step] == pytest.approx(expected, abs=1e-12), step
    same(load_file(output / "model" / "model.safetensors"), single, 2e-5)
    same_curve(output, single)
    counts = [json.loads((folder / "run.json").read_text())["trained_parameters"] for folder in (output, single)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("strategy", "precision", "more"),
    [
        ("deepspeed_stage_3", "32-true", ("--distill", "kd")),  # all parameters learn, the head outside its own forward
        ("deepspeed_stage_3_offload", "32-true", ("--distill", "lora")),
        ("deepspeed_stage_2_offload", "bf16-mixed", ("--distill", "lm", "--model.trainable", "layers")),
        (  # gradients of several batches are as large as on one process, or they would be clipped otherwise
            "deepspeed_stage_2",
            "32-true",
            ("--distill", "kd", "--trainer.accumulate_grad_batches", 4, "--trainer.gradient_clip_val", 0.05),
        ),
        ("fsdp", "32-true", ("--distill", "kd", "--model.trainable", "layers")),
    ],
)
def test_methods_that_run_the_head_where_parameters_are_in_parts(
    strategy: str, precision: str, more: tuple[str, ...], home: Path
) -> None:
    """What two processes save is what one saves; in bf16, what one saves up to bf16's own steps."""
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    if "lora" in more:
        pytest.importorskip("peft")
    name = "_".join([strategy, *map(str, more)]).replace("--", "")
    more = (*more, "--model.lr", "1e-3", "--trainer.precision", precision, "--samples", "false")
    trained(home, home / f"one_{name}", *more)
    parts = ("--trainer.devices", 2, "--trainer.strategy", strategy)
    weights = trained(home, home / name, *more, *parts, batch=2)
    # Adam's first steps have the size of the rate, whatever the size of the gradient: bf16 flips the sign of some
    same(weights, home / f"one_{name}", 2e-5 if precision == "32-true" else 5e-3)
    learned = weights["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(learned, learned.bfloat16().float())  # the optimizer's fp32 weights, not what bf16 sees
    infos = [json.loads((home / folder / "run.json").read_text()) for folder in (name, f"one_{name}")]
    assert infos[0]["trained_parameters"] == infos[1]["trained_parameters"]


def test_rate_from_the_command_line_reaches_the_student(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CoMe-sp keeps the published rate unless told otherwise; Adam moves a weight by the rate in each first step."""
    monkeypatch.chdir(home)
    before = load_file(home / "run" / "model" / "model.safetensors")
    moved = {}
    for rate in ("default", "1e-4"):
        words = [w for w in flags(home / f"sp_{rate}", "--distill", "sp", "--samples", "false") if w != "[1e-3, 1e-4]"]
        words.remove("--model.lr")
        assert started(monkeypatch, *words, *(("--model.lr", rate) if rate != "default" else ())) == 0
        after = load_file(home / f"sp_{rate}" / "model" / "model.safetensors")
        moved[rate] = max(float((after[k] - before[k]).abs().max()) for k in before)
    assert moved["1e-4"] / moved["default"] == pytest.approx(10, rel=0.2)
    told = [json.loads((home / f"sp_{rate}" / "run.json").read_text())["method"]["lr"] for rate in moved]
    assert told == [1e-5, 1e-4]


def test_a_build_that_was_killed_stops_nobody(tmp_path: Path) -> None:
    """torch's guard file, left behind by kill -9, would make every later DeepSpeed run wait for ever."""
    pytest.importorskip("deepspeed")
    from come_pl.distillation.strategy import extensions

    stale = extensions() / "deepspeed_shm_comm" / "lock"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    build = "from come_pl.distillation import strategy; strategy.build_communication()"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, env=ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}, timeout=300
    )
    assert done.returncode == 0 and not stale.exists()
    assert list(stale.parent.glob("*.so"))


def test_deepspeed_resumes(
    home: Path, single: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("deepspeed")
    output = home / "deepspeed_cut"
    more = ("--trainer.devices", 2, "--trainer.strategy", "deepspeed_stage_2")

    def halfway() -> bool:
        found = list((output / "checkpoints").glob("step=*.ckpt/whole"))
        return bool(found) and (output / "curves.csv").is_file() and len(curve(output)) >= 9

    kill_when(halfway, "train.py", *flags(output, *more, batch=2), cwd=home)
    monkeypatch.chdir(home)
    assert started(monkeypatch, *flags(output, *more[:2], "--trainer.strategy", "ddp", batch=2)) == 2
    assert "of DeepSpeed stage 2 on 2 processes" in capsys.readouterr().err
    same(trained(home, output, *more, batch=2), single, 2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--distill", "banana"), "expected one of mp, sp, kd, lora, lm, hybrid"),
        (("--student", "nowhere"), "holds no run of come_pl"),
        (("--model.lr", "llama9"), "one of llama2-7b, qwen3-4b"),
        (("--model.lr", "{1: 1e-3}"), "no rate for merged layers [3]"),
        (("--resume",), "holds no run to go on with"),
        (("--teacher", "nowhere/at/all"), "does not exist"),
        (("--data.source", "nowhere.txt"), "nowhere.txt"),
        (("--trainer.strategy", "banana"), "banana"),
        (("--model.schedule", "banana"), "schedule"),
        (("--model.schedule", "sequential", "--patience", "2"), "give --model.schedule joint"),
        (("--model.schedule", "sequential", "--trainer.devices", "2"), "give --model.schedule joint"),
        (("--patience", "0"), "at least 1 validation"),
        (("--save_every", "0"), "at least 1 optimizer step"),
        (("--trainer.val_check_interval", "1000"), "val_check_interval 1000: an epoch has 32 training batches"),
        (("--trainer.val_check_interval", "0"), "val_check_interval 0: an epoch has 32 training batches"),
        (("--trainer.limit_train_batches", "0.01"), "leaves none of 32 batches"),
        (("--trainer.accumulate_grad_batches", "0"), "accumulate_grad_batches 0: expected at least 1 batch"),
        (
            ("--trainer.strategy", "deepspeed_stage_2", "--trainer.accumulate_grad_batches", "5"),
            "an epoch has 32 batches, and DeepSpeed would carry over what is left; give a divisor of them, or "
            "--trainer.limit_train_batches 30",
        ),
        (
            ("--distill", "hybrid", "--model.merged_first", "0.5", "--trainer.strategy", "deepspeed_stage_2"),
            "merged_first 0.5: DeepSpeed clips and averages",
        ),
        (("--distill", "hybrid", "--model.second_lr", "-1"), "second_lr -1.0: expected a rate above 0"),
        (("--trainer.strategy", "ddp_spawn"), "give nothing back; expected ddp"),
        (("--trainer.precision", "16-true"), "weights in float16 do not train"),
        (("--trainer.max_epochs", "-1"), "the number of steps is not known"),
        (("--patience", "2", "--trainer.limit_val_batches", "0"), "patience 2: without a validation"),
        (("--trainer.check_val_every_n_epoch", "0"), "check_val_every_n_epoch 0: expected at least 1 epoch"),
        (("--trainer.gradient_clip_val", "-1"), "gradient_clip_val -1: expected a norm of at least 0"),
        (("--trainer.gradient_clip_algorithm", "value"), "gradients are clipped by their norm"),
        (("--model.weight_decay", "-0.1"), "weight_decay -0.1: expected at least 0"),
        (("--data.validation_tokens", "8"), "validation_tokens 8: expected at least one window"),
        (("--trainer.max_steps", "0"), "max_steps 0: nothing would be trained"),
        (("--trainer.max_epochs", "0"), "max_epochs 0: nothing would be trained"),
        (("--model.temperature", "0"), "temperature 0.0: expected a number above 0"),
        (("--plan", "--model.temperature", "0"), "temperature 0.0: expected a number above 0"),
        (("--distill", "kd", "--model.temperature", "-1"), "temperature -1.0: expected a number above 0"),
        (("--distill", "lora", "--model.alpha", "0"), "alpha 0: expected a number above 0"),
        (("--distill", "kd", "--trainer.strategy", "fsdp", "--trainer.devices", "2"), "give --model.trainable layers"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(home)
    assert started(monkeypatch, *flags(tmp_path / "o"), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert "perplexity" not in error  # said before anything is measured


def test_no_pruned_run_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert started(monkeypatch) == 2
    assert "run `python prune.py` first" in capsys.readouterr().err


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_config_starts_with_its_command_and_gives_a_plan(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first = file.read_text().splitlines()[0]
    words = first.removeprefix("# python train.py ").split()
    assert first.startswith("# python train.py --distill "), first
    arguments = ["run" if w == "RUN_FOLDER" else w.replace("configs/", f"{ROOT}/configs/") for w in words]
    if file.stem.startswith("distill"):
        arguments += ["--config", str(file)]
    monkeypatch.chdir(home)
    assert started(monkeypatch, *arguments, "--student", "run", "--plan") == 0, capsys.readouterr().err
    assert "total per device" in capsys.readouterr().out and not (home / "runs").exists()


def test_packaged_defaults_are_those_of_configs() -> None:
    packaged = sorted((ROOT / "come_pl" / "distillation" / "defaults").glob("*.yaml"))
    assert [p.name for p in packaged] == [p.name for p in CONFIGS if p.stem.startswith("distill_")]
    for file in packaged:
        assert yaml.safe_load(file.read_text()) == yaml.safe_load((ROOT / "configs" / file.name).read_text())
