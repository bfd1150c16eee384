"""What the README and the measurements tell people to type exists and is understood."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from cli import ROOT

from benchmarks.run import parser, tasks
from come_pl.cli.compare import compare_main
from come_pl.cli.evaluate import evaluate_main
from come_pl.cli.export import export_main
from come_pl.cli.latency import latency_main
from come_pl.cli.prune import prune_main
from come_pl.cli.report import report_main
from come_pl.cli.train import train_main

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/README.md")}
COMMANDS = [
    line.split("#")[0].strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.splitlines()
]


MAINS = {
    "come-compare": compare_main,
    "come-eval": evaluate_main,
    "come-export": export_main,
    "come-latency": latency_main,
    "come-report": report_main,
}


def commands(start: str) -> list[str]:
    return [line for line in COMMANDS if line.startswith(start)]


@pytest.mark.parametrize("line", commands("python prune.py") + commands("python train.py"))
def test_commands(line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*shlex.split(line)[1:], "--print_config"])
    with pytest.raises(SystemExit) as stop:
        train_main() if "train.py" in line else prune_main()
    assert stop.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("line", commands("come-"))
def test_console_scripts(line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [name, *words, "--print_config"])
    with pytest.raises(SystemExit) as stop:
        MAINS[name]()
    assert stop.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("line", commands("python -m benchmarks.run"))
def test_benchmark_commands(line: str) -> None:
    assert tasks(parser().parse_args(shlex.split(line)[3:]))


def test_make_targets() -> None:
    targets = [line.split()[1] for line in commands("make ")]
    assert {"prune", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_named_exists(name: str) -> None:
    page, folder = PAGES[name], (ROOT / name).parent
    for path in re.findall(r"`((?:come_pl|configs|benchmarks|tests)/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
    for path, anchor in re.findall(r"\]\(((?!http)[^)#]*)#?([^)]*)\)", page):
        target = folder / path if path else ROOT / name
        assert target.exists(), path
        if not anchor:
            continue
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in anchors, anchor
