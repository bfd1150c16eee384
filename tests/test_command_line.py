"""What every command says of a mistake, in one line; `--config` files, warnings, Ctrl-C and the help."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import yaml
from cli import exit_code, is_one_line

from come_pl.cli.common import guarded, quiet, with_doubles
from come_pl.cli.evaluate import evaluate_main
from come_pl.cli.parser import expected, nested
from come_pl.cli.prune import prune_main
from come_pl.cli.train import train_main

MAINS: dict[str, Callable[[], None]] = {"prune": prune_main, "train": train_main, "eval": evaluate_main}
FILES: dict[str, bytes] = {
    "text.yaml": b"plain words\n",
    "list.yaml": b"- 1\n- 2\n",
    "binary.yaml": b"\xff\xfe\x00\x01\x80",
    "empty.yaml": b"",
    "broken.yaml": b"method: [1\n",
    "unknown.yaml": b"output: x\ntraget_layers: 3\n",
    "mistyped.yaml": b"data: {tokens: abc}\n",
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("prune --config text.yaml", "--config text.yaml: the file holds text; expected options as NAME: VALUE"),
        ("prune --config list.yaml", "--config list.yaml: the file holds a list; expected"),
        ("prune --config binary.yaml", "--config binary.yaml: not YAML; expected"),
        ("prune --config empty.yaml", "--config empty.yaml: the file holds nothing; expected"),
        ("prune --config broken.yaml", "--config broken.yaml: not YAML (line 2); expected"),
        ("prune -c missing.yaml", "--config missing.yaml: No such file or directory; expected"),
        ("prune --config unknown.yaml", "Option 'traget_layers' is not accepted; did you mean --target_layers?"),
        ("prune --config mistyped.yaml", "--data.tokens abc: expected a whole number"),
        ("train --config text.yaml", "--config text.yaml: the file holds text; expected"),
        ("eval model --config list.yaml", "--config list.yaml: the file holds a list; expected"),
        ("prune --target_layers four", "--target_layers four: expected a whole number"),
        ("prune --target_layers 4.5", "--target_layers 4.5: expected a whole number"),
        ("prune --sparsity 25%", "--sparsity 25%: expected a number"),
        ("prune --samples maybe", "--samples maybe: expected true or false"),
        ("prune --refit.last x", "--refit.last x: expected a whole number or auto"),
        ("prune --refit x", "--refit.parts x: expected one of auto, best, none, down, both, all"),
        ("prune --preset x", "--preset x: expected one of best, paper"),
        ("prune --seed -1", "--seed -1: expected a whole number from 0 to 4294967295"),
        ("prune --seed 12345678901234567890", "--seed 12345678901234567890: expected a whole number"),
        ("prune --modelpath x", "unrecognized arguments: --modelpath=x; did you mean --model.path?"),
        ("prune --trainer.devices two", "`devices` selected with `CPUAccelerator` should be an int > 0"),
        ("train --bogus 3", "unrecognized arguments: --bogus=3; --help lists the options"),
        ("train --lr 3", "unrecognized arguments: --lr=3; did you mean --model.lr?"),
        ("train --data.tokens abc", "--data.tokens abc: expected a whole number"),
        ("train --trainer.precision bf17", "--trainer.precision bf17: expected one of 64, 32, 16, transformer-engine"),
        ("train --seed -1", "--seed -1: expected a whole number from 0 to 4294967295"),
        ("eval model --limit x", "--limit x: expected a whole number"),
    ],
)
def test_a_mistake_is_one_line(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    program, *rest = words.split()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    accelerator = [] if program == "eval" else ["--trainer.accelerator", "cpu"]
    assert exit_code(MAINS[program], program, *rest, *accelerator, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert is_one_line(error, f"error: {said}"), error
    assert error.count("did you mean") + error.count("--help lists") <= 1


def printed(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: object) -> str:
    assert exit_code(MAINS[program], program, *words, monkeypatch=monkeypatch) == 0
    return capsys.readouterr().out


def test_short_names_in_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("method: come\nrefit: none\nnsamples: 8\ndata: {seqlen: 32}\n")
    settings = yaml.safe_load(printed("prune", monkeypatch, capsys, "--config", "p.yaml", "--print_config"))
    assert settings["method"]["name"] == "come" and settings["refit"]["parts"] == "none"
    assert settings["data"]["nsamples"] == 8 and settings["data"]["seqlen"] == 32
    Path("t.yaml").write_text("distill: kd\n")
    settings = yaml.safe_load(printed("train", monkeypatch, capsys, "--config", "t.yaml", "--print_config"))
    assert settings["distill"]["name"] == "kd" and "temperature" in settings["model"]
    Path("paper.yaml").write_text("preset: paper\n")
    settings = yaml.safe_load(printed("prune", monkeypatch, capsys, "--config", "paper.yaml", "--print_config"))
    assert settings["method"]["name"] == "come" and settings["method"]["rho"] == 0.0


def test_short_names_become_groups() -> None:
    aliases = {"--method": "--method.name", "--nsamples": "--data.nsamples"}
    content = {"nsamples": 8, "data": {"seqlen": 32}, "method": "come", "seed": 3}
    whole = {"data": {"nsamples": 8, "seqlen": 32}, "method": {"name": "come"}, "seed": 3}
    assert nested(content, aliases) == whole == nested(whole, aliases)


def test_types_in_words() -> None:
    assert expected(int | None) == "a whole number" and expected(list[float] | None) == "a list of numbers"
    assert expected(Literal["a", "b"] | int) == "a whole number or one of a, b"
    assert expected(dict[str, int]) == "a mapping" and expected(bool) == "true or false"


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings():
        quiet()
        assert warnings.formatwarning("few\nwindows", UserWarning, "texts.py", 36, "code") == "warning: few windows\n"


def interrupted() -> None:
    raise KeyboardInterrupt


def interrupted_in_the_trainer() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("main", [interrupted, interrupted_in_the_trainer])
def test_ctrl_c_says_how_to_go_on(
    main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    goes_on = "the last finished step"
    assert exit_code(lambda: guarded(main, goes_on), "prune.py", monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err == f"stopped; the same command goes on from {goes_on}\n"
    assert exit_code(lambda: guarded(main, goes_on), "x", "--overwrite", monkeypatch=monkeypatch) == 130
    assert "the same command without --overwrite goes on" in capsys.readouterr().err
    assert exit_code(lambda: guarded(main), "come-eval", monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert exit_code(lambda: guarded(lambda: sys.exit(1)), "x", monkeypatch=monkeypatch) == 1


@pytest.mark.parametrize("program", ["prune", "train"])
def test_help_has_the_trainer_last(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = printed(program, monkeypatch, capsys, "--help")
    own = [page.index(f"  --{name} ") for name in ("seed", "data.tokens", "evaluation.tokens")]
    assert max(own) < page.index("  --trainer.accelerator ")
    assert "--seed_everything" not in page and "--method CONFIG" not in page


@pytest.mark.parametrize("program", ["prune", "train"])
def test_no_device_without_doubles(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert with_doubles("auto") == "cpu"
    main = {"prune": prune_main, "train": train_main}[program]
    for name in ("mps", "gpu"):
        assert exit_code(main, f"{program}.py", "--trainer.accelerator", name, monkeypatch=monkeypatch) == 2
        assert is_one_line(capsys.readouterr().err, f"accelerator {name}: sums are kept in fp64")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert [with_doubles(name) for name in ("auto", "gpu", "cpu")] == ["auto", "gpu", "cpu"]
