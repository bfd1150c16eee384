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
import yaml
from cli import ENVIRONMENT, ROOT, kill_when, run
from conftest import save_tiny, tiny_text
from safetensors.torch import load_file
from test_distillation import GROUPS, pruned_pair

from come_pl.runs import Run

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
        *("--model.lr", "[1e-3, 1e-4]", *more),
    ]


def curve(output: Path) -> list[dict[str, float]]:
    with open(output / "curves.csv") as opened:
        return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(opened)]


def trained(home: Path, output: Path, *more: object, batch: int = 4, timeout: float = 300) -> dict[str, Any]:
    done = run("train.py", *flags(output, *more, batch=batch), cwd=home, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def single(home: Path) -> Path:
    trained(home, home / "single")
    return home / "single"


def same(a: dict[str, Any], folder: Path, tolerance: float) -> None:
    for name, value in load_file(folder / "model" / "model.safetensors").items():
        assert (a[name] - value).abs().max() <= tolerance, name


def test_kill_and_the_same_command_again(home: Path, single: Path) -> None:
    output = home / "killed"
    command = flags(output)

    def halfway() -> bool:
        found = list((output / "checkpoints").glob("step=*.ckpt"))
        return bool(found) and (output / "curves.csv").is_file() and len(curve(output)) >= 9

    kill_when(halfway, "train.py", *command, cwd=home)
    assert not (output / "model").exists()
    weights = trained(home, output, "--resume")
    same(weights, single, 0)
    assert curve(output) == curve(single)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(strategy: str, home: Path, single: Path) -> None:
    more = ("--trainer.devices", 2, "--trainer.strategy", strategy)
    weights = trained(home, home / strategy, *more, batch=2)
    same(weights, single, 1e-5)
    assert [r["layer 1"] for r in curve(home / strategy)] == pytest.approx(
        [r["layer 1"] for r in curve(single)], rel=1e-4
    )


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


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_each_layer_keeps_its_rate(strategy: str, home: Path, single: Path, tmp_path: Path) -> None:
    if strategy.startswith("deepspeed") and not importlib.util.find_spec("deepspeed"):
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


def test_deepspeed_resumes(home: Path, single: Path) -> None:
    pytest.importorskip("deepspeed")
    output = home / "deepspeed_cut"
    more = ("--trainer.devices", 2, "--trainer.strategy", "deepspeed_stage_2")

    def halfway() -> bool:
        found = list((output / "checkpoints").glob("step=*.ckpt/latest"))
        return bool(found) and (output / "curves.csv").is_file() and len(curve(output)) >= 9

    kill_when(halfway, "train.py", *flags(output, *more, batch=2), cwd=home)
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
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, home: Path, tmp_path: Path) -> None:
    done = run("train.py", *flags(tmp_path / "o"), *arguments, cwd=home)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr and "Traceback" not in done.stderr


def test_no_pruned_run_yet(tmp_path: Path) -> None:
    done = run("train.py", cwd=tmp_path)
    assert done.returncode == 2 and "run `python prune.py` first" in done.stderr


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_config_starts_with_its_command_and_gives_a_plan(file: Path, home: Path) -> None:
    first = file.read_text().splitlines()[0]
    words = first.removeprefix("# python train.py ").split()
    assert first.startswith("# python train.py --distill "), first
    arguments = ["run" if w == "RUN_FOLDER" else w.replace("configs/", f"{ROOT}/configs/") for w in words]
    if file.stem.startswith("distill"):
        arguments += ["--config", str(file)]
    done = run("train.py", *arguments, "--student", "run", "--plan", cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "total per device" in done.stdout and not (home / "runs").exists()


def test_packaged_defaults_are_those_of_configs() -> None:
    packaged = sorted((ROOT / "come_pl" / "distillation" / "defaults").glob("*.yaml"))
    assert [p.name for p in packaged] == [p.name for p in CONFIGS if p.stem.startswith("distill_")]
    for file in packaged:
        assert yaml.safe_load(file.read_text()) == yaml.safe_load((ROOT / "configs" / file.name).read_text())
