"""Run folders: whose they are, what replaces a run and when, and what is never removed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from come_pl.distillation.student import read_pruned
from come_pl.runs import Run, RunError, followed, read_run
from come_pl.workflows.subject import read_subject

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A finished run."""
    folder = tmp_path / "run"
    run = Run(folder, {"seed": 1})
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "record.jsonl").write_text("old\n")
    run.update(status="finished")
    return folder


def is_old(folder: Path) -> bool:
    return read_run(folder)["identity"] == {"seed": 1} and (folder / "record.jsonl").read_text() == "old\n"


def alone(folder: Path) -> bool:
    """Whether nothing hidden is left beside it."""
    return not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("through", ["", "model", "model/config.json", "../latest", "../latest/model"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_read_is_never_the_output(old: Path, through: str, overwrite: bool) -> None:
    (old.parent / "latest").symlink_to("run", target_is_directory=True)
    wanted = "is what --student reads" if through in ("", "../latest") else "which --student reads; give another"
    with pytest.raises(RunError, match=wanted):
        Run(old, {"seed": 2}, overwrite=overwrite, reads=[("--data", "embedded"), ("--student", str(old / through))])
    assert is_old(old)


def test_what_lies_beside_or_above_may_be_read(old: Path) -> None:
    beside = [("--model.path", str(old.parent)), ("--data.calibration", str(old.parent / "run.txt"))]
    assert Run(old, {"seed": 1}, reads=beside).resumed


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_before_its_first_step_puts_the_old_one_back(
    old: Path, error: type[BaseException], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(error), Run(old, {"seed": 2}, overwrite=True) as run:
        assert read_run(old)["identity"] == {"seed": 2} and not (old / "model").exists()
        run.update(perplexity={})
        raise error
    assert is_old(old) and alone(old)
    assert "is back" in capsys.readouterr().out


@pytest.mark.parametrize("fruit", ["record.jsonl", "checkpoints/step=1.ckpt", "model/config.json"])
def test_a_run_that_fails_after_a_step_has_replaced_the_old_one(old: Path, fruit: str) -> None:
    with pytest.raises(ValueError), Run(old, {"seed": 2}, overwrite=True) as run:
        (old / fruit).parent.mkdir(exist_ok=True)
        (old / fruit).write_text("new")
        run.settle()
        assert alone(old)
        raise ValueError
    assert read_run(old)["identity"] == {"seed": 2} and read_run(old)["status"] == "running"
    assert (old / fruit).read_text() == "new" and alone(old)


@pytest.mark.parametrize("again", [{"seed": 1}, {"seed": 2}])
def test_the_next_start_puts_back_what_a_kill_left(old: Path, again: dict[str, int]) -> None:
    Run(old, {"seed": 2}, overwrite=True)  # and no more
    assert not is_old(old)
    if again == {"seed": 1}:
        assert Run(old, again).finished
    else:
        with pytest.raises(RunError, match="seed is 1 there, 2 here"):
            Run(old, again)
    assert is_old(old) and alone(old)


def test_killed_while_the_folder_was_away(old: Path) -> None:
    old.rename(old.with_name(".run.replaced"))
    assert Run(old, {"seed": 1}).finished and is_old(old)


def test_killed_after_a_step(old: Path) -> None:
    Run(old, {"seed": 2}, overwrite=True)
    (old / "record.jsonl").write_text("new")
    assert Run(old, {"seed": 2}).resumed
    assert (old / "record.jsonl").read_text() == "new" and alone(old)


def test_killed_while_the_old_one_was_removed(old: Path) -> None:
    Run(old, {"seed": 2}, overwrite=True)
    (old.with_name(".run.replaced") / "run.json").unlink()
    assert Run(old, {"seed": 2}).resumed and alone(old)


def test_finished_without_with(old: Path) -> None:
    run = Run(old, {"seed": 2}, overwrite=True)
    (old / "model").mkdir()
    (old / "model" / "config.json").write_text("new")
    run.update(status="finished")
    assert alone(old)


def test_overwrite_through_a_link(old: Path) -> None:
    link = old.parent / "latest"
    link.symlink_to("run", target_is_directory=True)
    with pytest.raises(ValueError), Run(link, {"seed": 2}, overwrite=True):
        raise ValueError
    assert is_old(old) and link.is_symlink() and alone(old)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_no_other_command_gets_a_folder_that_is_being_written(tmp_path: Path, overwrite: bool, before: bool) -> None:
    """Nor while a run that is to be replaced is set aside; once it has ended, however it has, one does."""
    folder = tmp_path / "run"
    if before:
        Run(folder, {"seed": 1}).update(perplexity={})
    (tmp_path / "latest").symlink_to("run", target_is_directory=True)
    with Run(folder, {"seed": 2}, overwrite=before):
        there = {p.name: p.read_bytes() for p in folder.iterdir()}
        for way in (folder, tmp_path / "latest"):
            with pytest.raises(RunError, match="is being written by another command; wait for it to end, or give"):
                Run(way, {"seed": 2}, overwrite=overwrite)
        assert there == {p.name: p.read_bytes() for p in folder.iterdir()}
        assert (folder.with_name(".run.replaced")).is_dir() == before
        assert Run(folder, {"seed": 2}, main=False).resumed, "a process of the same run"
    assert alone(folder)
    with Run(folder, {"seed": 2}, overwrite=overwrite) if not before else Run(folder, {"seed": 1}):
        pass


def test_a_killed_command_holds_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"import sys; from come_pl.runs import Run; r = Run(__import__('pathlib').Path({str(folder)!r}), {{}})"
    process = subprocess.Popen([sys.executable, "-c", f"{code}; print(1, flush=True); sys.stdin.read()"], **PIPES)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    with pytest.raises(RunError, match="is being written"):
        Run(folder, {})
    process.kill()
    process.communicate()
    assert Run(folder, {}).resumed


@pytest.mark.parametrize("seed", [1, 2])
def test_another_process_moves_nothing_and_reads_nothing_that_is_to_go(old: Path, seed: int) -> None:
    with Run(old, {"seed": seed}, overwrite=True, main=False) as run:
        assert not run.finished and not run.resumed
    assert is_old(old)


def test_a_run_that_is_given_the_link_leaves_it(old: Path) -> None:
    link = old.parent / "latest"
    link.symlink_to("run", target_is_directory=True)
    Run(link, {"seed": 1}).close(old.parent, "scratch")
    assert link.readlink() == Path("run") and alone(old)
    link.unlink()
    run = Run(link, {"seed": 1})  # a folder of that name
    run.close(old.parent, "scratch")
    assert not link.is_symlink() and read_run(link)["identity"] == {"seed": 1} and alone(old)


def test_a_link_is_followed_once(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old.parent / "latest").symlink_to("run", target_is_directory=True)
    assert followed(old) == old and followed(old.parent / "latest") == old
    monkeypatch.chdir(old.parent)
    assert followed(Path("latest")) == followed(Path("run")) == Path("run")
    (old / "model" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("come_pl.models.load_config", lambda path: None)
    subject = read_subject("latest")
    assert subject.run == Path("run") and subject.path == "run"
    link = old.parent / "model.gguf"  # as a hub's cache has it: to a file of another name
    link.symlink_to("run/record.jsonl")
    subject = read_subject("model.gguf")
    assert subject.run is None and subject.path == "model.gguf"
    Run(Path("run"), {"seed": 1}).update(groups=[[0, 1]], model={"path": "dense", "layers": 2})
    assert read_pruned("latest").folder == Path("run")


def _kill(folder: Path) -> None:
    Run(folder, {"seed": 1})


def _fail(folder: Path) -> None:
    with pytest.raises(ValueError), Run(folder, {"seed": 1}) as run:
        run.update(perplexity={"text": {"dense": 3.0}})
        (folder / "logs").mkdir()
        raise ValueError


@pytest.mark.parametrize("end", [_kill, _fail])
def test_a_folder_with_no_step_is_free(tmp_path: Path, end: Callable[[Path], None]) -> None:
    end(tmp_path / "run")
    new = Run(tmp_path / "run", {"seed": 2})
    assert not new.resumed and read_run(tmp_path / "run")["identity"] == {"seed": 2}
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_run_that_failed_goes_on(tmp_path: Path) -> None:
    _fail(tmp_path / "run")
    assert read_run(tmp_path / "run")["status"] == "failed"
    run = Run(tmp_path / "run", {"seed": 1})
    assert run.resumed and run.info["status"] == "running" and run.info["perplexity"]["text"]["dense"] == 3.0


@pytest.mark.parametrize("kept", ["perplexity", "mine.txt", "record.jsonl", "checkpoints/step=1.ckpt", "model-5"])
def test_a_folder_with_anything_of_value_is_not_free(tmp_path: Path, kept: str) -> None:
    folder = tmp_path / "run"
    run = Run(folder, {"seed": 1})
    if kept == "perplexity":
        run.update(perplexity={})
    del run
    if kept != "perplexity":
        (folder / kept).parent.mkdir(exist_ok=True)
        (folder / kept).write_text("")
    with pytest.raises(RunError, match="holds another run"):
        Run(folder, {"seed": 2})
    assert kept == "perplexity" or (folder / kept).exists()


def test_the_difference_that_says_most_is_told_first(tmp_path: Path) -> None:
    def identity(name: str, print_: str, **options: object) -> dict[str, object]:
        return {"method": {"name": name, **options}, "data": {"fingerprint": print_ * 16}, "seed": 0}

    Run(tmp_path / "run", identity("come", "ab", angular=1)).update(perplexity={})
    with pytest.raises(RunError, match=r"\(method.name is 'come' there, 'sleb' here and 3 more\)"):
        Run(tmp_path / "run", identity("sleb", "cd", a=1))
    with pytest.raises(RunError, match=r"\(data.fingerprint, of the text .*, is abababab there, cdcdcdcd here\)"):
        Run(tmp_path / "run", identity("come", "cd", angular=1))


def test_the_model_of_a_run_is_told_from_the_run(old: Path) -> None:
    with pytest.raises(RunError, match=f"holds no run .* the folder above it does: give '{old}'"):
        read_run(old / "model")
