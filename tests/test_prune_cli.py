"""`python prune.py` as a user types it: results, resuming, several processes, and every way to get it wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli import ENVIRONMENT, ROOT, exit_code, kill_when, records, run
from conftest import save_tiny
from safetensors.torch import load_file

from come_pl.cli.common import normalise, scan
from come_pl.cli.prune import ALIASES, LISTS, SWITCHES, prune_main
from come_pl.decoder import Decoder
from come_pl.models import ModelError, load_model
from come_pl.runs import Run, RunError, read_run

SMALL = ("--data.tokens", 512, "--data.seqlen", 32, "--evaluation.tokens", 512, "--seed", 3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, layers=6)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in a fixed disorder, enough for any budget here."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    order = torch.randint(0, 90, (40_000,), generator=torch.Generator().manual_seed(1)).tolist()
    file.write_text(" ".join(f"w{i}" for i in order))
    return file


@pytest.fixture(scope="module")
def done(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, 6 → 3 layers, by the command line."""
    folder = tmp_path_factory.mktemp("done")
    result = run("prune.py", *basic(tiny, text, folder / "run"), "--continue-saving", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "6 → 3" in result.stdout and "perplexity" in result.stdout
    (folder / "said.txt").write_text(result.stdout)
    return folder / "run"


def basic(tiny: Path, text: Path, output: Path) -> list[object]:
    return [
        *("--model.path", tiny, "--data.calibration", text, "--evaluation.data", text, "--output", output),
        *("--target_layers", 3, *SMALL),
    ]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_everything_is_written(done: Path, tiny: Path) -> None:
    names = {p.name for p in done.iterdir()}
    assert {
        "model",
        "model-5",
        "model-4",
        "record.jsonl",
        "run.json",
        "merge_map.png",
        "importance.png",
        "logs",
    } <= names
    info = read_run(done)
    assert info["status"] == "finished"
    assert info["data"]["tokens"] == 512 and info["data"]["windows"] == 16
    assert info["parameters"]["dense"] - info["parameters"]["pruned"] == 3 * info["parameters"]["layer"]
    assert {"torch", "transformers", "lightning", "come_pl"} <= set(info["versions"])
    steps = [json.loads(line) for line in (done / "record.jsonl").read_text().splitlines()]
    keys = {"step", "kind", "layers", "ratio", "scores", "groups", "seconds", "peak_gib", "loss", "kl"}
    assert len(steps) == 3 and all(keys <= set(step) for step in steps)
    assert [len(step["groups"]) for step in steps] == [5, 4, 3]
    assert sorted(sum(steps[-1]["groups"], [])) == list(range(6))
    logged = (done / "logs" / "metrics.csv").read_text().splitlines()
    assert len(logged) == 4 and {"layers", "loss", "kl"} <= set(logged[0].split(","))
    card = (done / "model" / "README.md").read_text()
    assert "6 → 3 layers" in card and "AutoModelForCausalLM" in card


def test_models_on_the_way_are_said_to_be_unrepaired(done: Path) -> None:
    said = (done.parent / "said.txt").read_text()
    assert "--continue_saving: repairs come at the end; models of depths on the way are saved without them" in said


def test_the_saved_model_is_stock(done: Path) -> None:
    """Loads, computes and generates in a process that never imports this package."""
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for name, layers in (("model", 3), ("model-4", 4), ("model-5", 5)):
    model, info = AutoModelForCausalLM.from_pretrained({str(done)!r} + "/" + name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert len(model.model.layers) == layers
    ids = torch.tensor([[5, 6, 7]])
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
AutoTokenizer.from_pretrained({str(done)!r} + "/model")
assert "come_pl" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_perplexity_in_run_json_is_that_of_the_saved_model(done: Path, tiny: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny)(text.read_text(), add_special_tokens=False).input_ids[:512]
    ids = torch.tensor(words).view(-1, 32)
    for which, folder in (("dense", tiny), ("pruned", done / "model")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            expected = model(ids, labels=ids).loss.exp().item()
        assert read_run(done)["perplexity"][str(text)][which] == pytest.approx(expected, rel=1e-4)


def test_two_processes_give_the_same_record(done: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    arguments = basic(tiny, text, tmp_path / "run")
    result = run("prune.py", *arguments, "--trainer.devices", 2, "--trainer.accelerator", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "run") == records(done)
    assert weights(tmp_path / "run") == weights(done)
    assert read_run(tmp_path / "run")["devices"] == 2


@pytest.mark.parametrize("point", ["before the first step", "after step 1", "while saving"])
def test_killed_and_run_again_gives_the_identical_model(
    done: Path, tiny: Path, text: Path, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    record = output / "record.jsonl"

    def lines() -> int:
        return record.read_text().count("\n") if record.is_file() else 0

    condition = {
        "before the first step": lambda: (output / "run.json").is_file(),
        "after step 1": lambda: lines() >= 1,
        "while saving": lambda: (output / ".model.partial").is_dir() or (output / "model").is_dir(),
    }[point]
    kill_when(condition, "prune.py", *basic(tiny, text, output), "--continue_saving", cwd=tmp_path)
    assert read_run(output)["status"] == "running"
    words = *basic(tiny, text, output), "--continue_saving"
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
    assert records(output) == records(done)
    assert weights(output) == weights(done)
    assert {"model-5", "model-4"} <= {p.name for p in output.iterdir()}
    if point != "while saving":  # then nothing was left to measure, and the log is the first run's
        assert len((output / "logs" / "metrics.csv").read_text().splitlines()) == 1 + 3
    assert not list(output.glob(".*partial"))


def test_finished_run_is_not_run_again(
    done: Path, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = (done / "record.jsonl").stat().st_mtime_ns
    assert exit_code(prune_main, "prune.py", *basic(tiny, text, done), monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "finished already" in said and "not measured on" not in said
    other = text.with_name("other.txt")
    other.write_text(text.read_text())
    words = [*basic(tiny, text, done), "--evaluation.data", other]
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
    assert f"not measured on {other}: come-eval {done} --texts {other} does that" in capsys.readouterr().out
    assert (done / "record.jsonl").stat().st_mtime_ns == before


def test_letters_that_a_terminal_has_not_do_not_end_a_run(done: Path, tiny: Path, text: Path) -> None:
    words = [sys.executable, str(ROOT / "prune.py"), *map(str, basic(tiny, text, done))]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(words, cwd=done.parent, env=environment, capture_output=True)
    assert result.returncode == 0 and b"6 ? 3" in result.stdout, result.stderr


def test_disk_that_fills_up_leaves_no_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    """A file size limit stands for a full disk: the weights cannot be written."""
    import resource

    def limit() -> None:
        size = (tiny / "model.safetensors").stat().st_size // 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    words = [sys.executable, str(ROOT / "prune.py"), *map(str, basic(tiny, text, tmp_path / "run"))]
    result = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run").glob(".model*"))
    assert read_run(tmp_path / "run")["status"] == "running"


# -- bad input: one clear line, exit code 2, nothing half-written ---------------------------------------------------


def refuse(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["prune.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        prune_main()
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last
    return last


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--target_layers", 6), "target_layers 6: the model has 6 layers; expected a depth from 1 to 5"),
        (("--target_layers", 0), "target_layers 0"),
        (("--target_layers", -2), "target_layers -2"),
        (("--sparsity", 1.5), "sparsity 1.5"),
        (("--sparsity", 0), "sparsity 0"),
        (("--sparsity", 0.99), "would leave none"),
        (("--target_layers", 3, "--sparsity", 0.3), "give one"),
        (("--target_layers", 3, "--method", "comee"), "did you mean 'come'"),
        (("--target_layers", 3, "--method", "come", "--method.rho", 1.5), "rho 1.5"),
        (("--target_layers", 3, "--method", "come", "--method.merge_item", 1), "merge_item 1"),
        (("--target_layers", 3, "--method", "come", "--granularity", 5), "granularity"),
        (("--target_layers", 3, "--data.calibration", "no/such.txt"), "no/such.txt"),
        (("--target_layers", 3, "--data.tokens", 8, "--data.seqlen", 32), "tokens"),
        (("--target_layers", 3, "--trainer.strategy", "nonsense"), "nonsense"),
        (("--target_layers", 3, "--trainer.strategy", "ddp_spawn"), "give nothing back; expected ddp"),
        (("--target_layers", 3, "--data.seqlen", 1), "seqlen is 1: expected at least 2"),
        (("--target_layers", 3, "--model.dtype", "float7"), "float7"),
        (("--target_layers", 3, "--method", "reverse", "--retain_layer", 9), "retain_layer 9: the model has layers 0"),
        (("--target_layers", 3, "--method", "sleb", "--method.barriers", 2), "barriers 2 protect 4 layers"),
        (("--target_layers", "three"), "three"),
        (("--target_layers", 3, "--method", "sleb", "--refit_when", "end"), "refit.when end: nothing is repaired here"),
        (("--target_layers", 3, "--refit", "none", "--refit_last", 4), "refit.last 4: nothing is repaired"),
        (("--target_layers", 3, "--method", "mka", "--refit_ahead", 1), "refit.ahead 1: nothing is repaired"),
        (("--target_layers", 3, "--method", "mka", "--refit.folds", 3), "refit.folds 3: nothing is repaired"),
        (("--target_layers", 3, "--no_such_option", 1), "no_such_option"),
        (("--config", "no_such.yaml"), "no_such.yaml"),
    ],
)
def test_bad_settings(
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    arguments: tuple,
    expected: str,
) -> None:
    output = tmp_path / "run"
    fixed = ["--model.path", tiny, "--data.calibration", text, "--evaluation.data", text, "--output", output, *SMALL]
    assert expected in refuse(capsys, monkeypatch, *fixed, *arguments)
    assert not output.exists()


def test_model_that_is_not_there(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = ("--output", tmp_path / "run")
    assert "does not exist" in refuse(capsys, monkeypatch, "--model.path", tmp_path / "nothing", *output)
    assert "no config.json" in refuse(capsys, monkeypatch, "--model.path", tmp_path, *output)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unreachable = refuse(capsys, monkeypatch, "--model.path", "nobody/nothing", *output)
    absent = refuse(capsys, monkeypatch, "--model.path", "package:no_such_package", *output)
    assert "cannot be reached" in unreachable and "is not installed" in absent
    assert "--model.path" not in unreachable + absent, "other commands have no such option"
    assert not (tmp_path / "run").exists()


def test_unknown_family(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    line = refuse(capsys, monkeypatch, "--model.path", tmp_path / "gpt2", "--output", tmp_path / "run")
    assert "'gpt2' is not supported" in line and "llama" in line and "decoder.py" in line
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if "layers.2.mlp" in n)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    line = refuse(capsys, monkeypatch, *basic(broken, text, tmp_path / "run"))
    assert "NaN" in line and "layers.2.mlp" in line
    assert not (tmp_path / "run" / "model").exists()


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000])


def _pickle(content: bytes) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return broken


def _forget_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_cut, "model.safetensors' is no whole safetensors file: it ends before"),
        (_pickle(b""), "model.safetensors is not there; a pickle (.bin) is first loaded and saved again"),
        (_forget_tokenizer, "has no tokenizer; copy tokenizer.json and tokenizer_config.json of its base model"),
    ],
)
def test_model_that_is_damaged_leaves_the_run_that_was_there(
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    text: Path,
    done: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    expected: str,
) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    output = shutil.copytree(done, tmp_path / "run")
    damage(broken)
    line = refuse(capsys, monkeypatch, *basic(broken, text, output), "--overwrite")
    assert str(broken) in line and expected in line
    assert weights(output) == weights(done) and read_run(output) == read_run(done)
    assert {p.name for p in tmp_path.iterdir()} == {"broken", "run"}


def test_overwrite_replaces_with_the_first_step(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, done: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(done, tmp_path / "run")
    one = *basic(tiny, text, output), "--overwrite", "--trainer.max_steps", 1
    seen: list[bool] = []
    settle = Run.settle

    def watched(self: Run) -> None:
        seen.append((tmp_path / ".run.replaced").exists())
        settle(self)

    monkeypatch.setattr(Run, "settle", watched)
    assert exit_code(prune_main, "prune.py", *one, monkeypatch=monkeypatch) == 0
    assert seen == [False, True, False] and len(records(output)) == 1 and not (output / "model").exists()


@pytest.mark.parametrize("option", ["--model.path", "--data.calibration", "--evaluation.data"])
def test_overwrite_of_what_is_read(
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    text: Path,
    done: Path,
    tmp_path: Path,
    option: str,
) -> None:
    output = shutil.copytree(done, tmp_path / "run")
    file = shutil.copyfile(text, output / "words.txt")
    read = output if option == "--model.path" else file
    words = *basic(tiny, text, output), "--target_layers", 2, "--overwrite", option, read
    line = refuse(capsys, monkeypatch, *words)
    assert f"{option} reads; give another --output" in line
    assert weights(output) == weights(done) and file.is_file()


def test_a_corrected_command_goes_into_the_same_folder(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    _cut(broken)
    refuse(capsys, monkeypatch, *basic(broken, text, tmp_path / "run"))
    words = *basic(tiny, text, tmp_path / "run"), "--method", "reverse", "--samples", "false"
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0


def test_tokens_without_embeddings(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    small = save_tiny(tmp_path / "small", layers=4, vocab_size=50)
    line = refuse(capsys, monkeypatch, *basic(Path(small), text, tmp_path / "run"))
    assert f"tokenizer of {small!r} makes token" in line and "embeddings have 50 rows" in line
    assert not (tmp_path / "run").exists()


def test_windows_longer_than_the_model_was_made_for(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    opt = save_tiny(tmp_path / "opt", "opt", layers=4)
    line = refuse(capsys, monkeypatch, *basic(Path(opt), text, tmp_path / "run"), "--evaluation.seqlen", 65)
    assert f"seqlen is 65: {opt!r} has positions for 64 tokens" in line and not (tmp_path / "run").exists()
    rotary = save_tiny(tmp_path / "llama", layers=4, max_position_embeddings=31)
    words = *basic(Path(rotary), text, tmp_path / "run"), "--method", "reverse", "--samples", "false"
    with pytest.warns(UserWarning, match="seqlen 32 is more than the 31 tokens"):
        assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0


def test_text_too_short(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    arguments = basic(tiny, text, tmp_path / "run")
    line = refuse(capsys, monkeypatch, *arguments, "--data.calibration", tmp_path / "short.txt")
    assert "short.txt is too short for one window of 32 tokens (it has 3)" in line
    assert not (tmp_path / "run" / "model").exists()


def test_folder_of_another_run(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, done: Path, tmp_path: Path
) -> None:
    before = weights(done)
    line = refuse(capsys, monkeypatch, *basic(tiny, text, done), "--method.compensate", "magnitude")
    assert "holds another run (method.compensate is 'none' there, 'magnitude' here)" in line
    assert weights(done) == before
    (tmp_path / "mine.txt").write_text("not to be touched")
    assert "not empty" in refuse(capsys, monkeypatch, *basic(tiny, text, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "method", "parts"),
    [
        ([], "shortest_path", "all"),
        (["--preset", "paper"], "come", "none"),
        (["--method", "prune_comp"], "prune_comp", "none"),
        (["--method", "come"], "come", "down"),
        (["--refit", "none"], "shortest_path", "none"),
        (["--refit", "down"], "shortest_path", "down"),
    ],
)
def test_what_runs_where_no_method_is_given(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    method: str,
    parts: str,
) -> None:
    arguments = [*basic(tiny, text, tmp_path / "run"), *words, "--samples", "false"]
    assert exit_code(prune_main, "prune.py", *arguments, monkeypatch=monkeypatch) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["method"]["name"], info["refit"]["parts"]) == (method, parts)
    assert info["method"].get("select", "span") == "span"


def test_the_printed_default_is_the_default(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = [*basic(tiny, text, tmp_path / "run"), "--samples", "false"]
    assert exit_code(prune_main, "prune.py", *words, "--print_config", monkeypatch=monkeypatch) == 0
    config = tmp_path / "printed.yaml"
    config.write_text(capsys.readouterr().out)
    assert exit_code(prune_main, "prune.py", "--config", config, monkeypatch=monkeypatch) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["method"]["name"], info["method"]["bridge"], info["refit"]["parts"]) == ("shortest_path", 16, "all")


def test_without_a_method_a_family_that_cannot_be_repaired_is_pruned(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "gemma", family="gemma3", layers=5)
    arguments = [*basic(model, text, tmp_path / "run"), "--samples", "false"]
    assert exit_code(prune_main, "prune.py", *arguments, monkeypatch=monkeypatch) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    found = info["method"]["name"], info["method"]["bridge"], info["refit"]["parts"]
    assert found == ("shortest_path", 0, "none"), "nothing will stand in the gaps"


def test_going_on_with_another_text_to_measure_compares_like_with_like(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    """Whether more or fewer tokens of it, a text beside it, or a file that has changed."""
    other = tmp_path / "other.txt"
    other.write_text(text.read_text())
    for tokens, texts in ((512, [other]), (64, [text, other])):
        words = basic(tiny, text, tmp_path / "run")
        at = words.index("--evaluation.data")
        words[at : at + 2] = ["--evaluation.data", *texts]
        words += ["--evaluation.tokens", tokens, "--trainer.max_steps", 1]
        assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
        found = read_run(tmp_path / "run")["perplexity"]
        assert list(found) == list(map(str, texts))
        assert all(entry["tokens"] == tokens // 32 * 31 and entry["dense"] for entry in found.values())
        before = found[str(other)]
    other.write_text(" ".join(other.read_text().split()[::-1]))
    assert exit_code(prune_main, "prune.py", *words[:-2], monkeypatch=monkeypatch) == 0
    found = read_run(tmp_path / "run")["perplexity"]
    assert found[str(other)]["dense"] != before["dense"] and all("pruned" in entry for entry in found.values())


def test_a_pickle_is_read_where_it_is_named(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "old")
    named = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), named)
    (folder / "model.safetensors").unlink()
    assert "a pickle (.bin) is" in refuse(capsys, monkeypatch, *basic(folder, text, tmp_path / "run"))
    state, expected = (load_model(str(path)).state_dict() for path in (named, tiny))
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with pytest.raises(ModelError, match="--offload disk reads safetensors files, not a pickle"):
        load_model(str(named), offload="disk")
    for content, said in ((b"", "damaged or cut short"), (b"PK\x03\x04" + bytes(99), "PytorchStreamReader failed")):
        named.write_bytes(content)
        with pytest.raises(ModelError, match=f"cannot be read: .*{said}"):
            load_model(str(named))


def test_run_of_other_weights_is_not_gone_on_with(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    words = *basic(model, text, tmp_path / "run"), "--trainer.max_steps", 1
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
    assert "stopped at 5 layers" in capsys.readouterr().out
    save_tiny(model, layers=6, seed=9)
    line = refuse(capsys, monkeypatch, *basic(model, text, tmp_path / "run"))
    assert "not those that the run" in line
    assert len(records(tmp_path / "run")) == 1


def test_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refuse(capsys, monkeypatch, *basic(tiny, text, tmp_path / "file" / "run"))

    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_text", read_only)
    assert "Read-only" in refuse(capsys, monkeypatch, *basic(tiny, text, tmp_path / "other"))


def test_parts_of_a_repair_may_be_left_out_where_there_is_none(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = ("--refit_last", 0, "--refit_ahead", 0, "--refit_channels", "own", "--refit_final", "false")
    words = *basic(tiny, text, tmp_path / "run"), "--method", "reverse", *off, "--samples", "false"
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0


@pytest.mark.parametrize(
    ("more", "why", "saved"),
    [
        ((), "4, 5 not measured: repairs come at the end", {4, 5}),
        (("--refit", "none"), "4, 5 not measured: shortest_path plans for the last depth", {4, 5}),
        (("--method", "sleb"), None, {4, 5}),
        (("--method", "sleb", "--evaluation.at", "[4,9]"), "9 not measured: depths on the way are 4 to 5", {4}),
    ],
)
def test_depths_that_are_saved_are_those_that_are_asked_for(
    more: tuple[object, ...],
    why: str | None,
    saved: set[int],
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    at = ("--continue_saving", "--evaluation.at", "[4,5]", "--samples", "false")
    words = *basic(tiny, text, tmp_path / "run"), *at, *more
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--evaluation.at")]
    assert said == ([f"--evaluation.at: {why}"] if why else [])
    assert {p.name for p in (tmp_path / "run").glob("model-*")} == {f"model-{depth}" for depth in saved}


@pytest.mark.parametrize(
    ("method", "batches", "matters"),
    [
        (("--method", "shortgpt"), (2, 4), False),
        (("--method", "sleb"), (2, 4), False),
        (("--method", "sleb", "--method.race", "true"), (2, 4), True),
        (("--method", "streamline", "--method.epochs", 1), (2, 4), True),
        (("--method", "replaceme"), (2, 4), False),
        (("--method", "replaceme", "--method.solver", "cosine"), (2, 4), True),
        (("--method", "prune_comp", "--method.windows", 8), (2, 4), False),  # whole batches either way
        (("--method", "prune_comp", "--method.windows", 6), (2, 4), True),
        (("--method", "come", "--select", "local"), (2, 4), True),
    ],
)
def test_batches_are_part_of_what_a_run_is_where_they_decide(
    method: tuple[object, ...],
    batches: tuple[int, int],
    matters: bool,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    words = [*basic(tiny, text, tmp_path / "run"), *method, "--trainer.max_steps", 1, "--data.batch_size"]
    assert exit_code(prune_main, "prune.py", *words, batches[0], monkeypatch=monkeypatch) == 0
    code = exit_code(prune_main, "prune.py", *words, batches[1], monkeypatch=monkeypatch)
    assert code == (2 if matters else 0)
    assert ("holds another run (batches." in capsys.readouterr().err) == matters


@pytest.mark.parametrize(
    ("more", "layers", "streams"),
    [
        (("--method", "shortgpt"), 0, 0),
        (("--method", "fusegpt", "--method.group_size", 4, "--method.epochs", 1), 3 * 4, 0),
        (("--method", "streamline"), 3 * 1, 0),
        (("--method", "come"), 3 + 3, 0),  # a layer a step, and all that are left at the end
        ((), 3, 0),
        (("--method", "shortgpt", "--cache_gib", 0), 0, 1),
        (("--method", "shortgpt", "--cache", "disk"), 0, 1),
        (("--method", "shortgpt", "--cache", "none"), 0, 0),
    ],
)
def test_room_is_asked_for_all_that_is_written(
    more: tuple[object, ...],
    layers: int,
    streams: int,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model, layers of weights that steps keep, and streams that are not in memory."""
    from come_pl.workflows import prune as workflow

    asked: list[float] = []

    def enough(folder: Path, gib: float) -> None:
        asked.append(gib * 2**30)
        raise RunError("enough")

    monkeypatch.setattr(workflow, "check_space", enough)
    monkeypatch.setattr(workflow, "retires", lambda *_: False)  # dense layers that are put away count, too
    words = *basic(tiny, text, tmp_path / "run"), *more
    assert exit_code(prune_main, "prune.py", *words, monkeypatch=monkeypatch) == 2
    decoder = Decoder(load_model(str(tiny)))
    model = sum(p.numel() for p in decoder.model.parameters())
    expected = 1.1 * model + layers * decoder.layer_parameters + streams * 2 * 512 * 32 * 7
    assert asked == [pytest.approx(4 * expected)]


def test_disk_without_room(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 10))
    line = refuse(capsys, monkeypatch, *basic(tiny, text, tmp_path / "run"))
    assert "GiB free" in line and "needed" in line
    assert not (tmp_path / "run" / "record.jsonl").exists()


# -- the words of the command line ------------------------------------------------------------------------------------


def words(*argv: str) -> list[str]:
    return normalise(argv, ALIASES, SWITCHES, LISTS)


def test_texts_stay_what_they_are() -> None:
    texts = ["C:\\texts\\new.txt", 'it\'s "so"', "two\nlines", "Größe"]
    [_, word] = sorted(words("--output=x", "--evaluation.data", *texts), reverse=True)
    assert yaml.safe_load(word.partition("=")[2]) == texts


def test_official_commands_are_understood() -> None:
    official = (
        "--method concat_merge --model-name m --target-layers 22 --save-path out --continue-saving --seed 10 "
        "--calibration-dataset wiki2 --nsamples 256 --skip-method bi --merge-item 2 --wo-repeat --ppl-data wiki2 c4"
    )
    assert words(*official.split()) == [
        "--method.name=concat_merge",
        "--model.path=m",
        "--target_layers=22",
        "--output=out",
        "--continue_saving=true",
        "--seed=10",
        "--data.calibration=wiki2",
        "--data.nsamples=256",
        "--method.skip_method=bi",
        "--method.merge_item=2",
        "--method.wo_repeat=true",
        '--evaluation.data=["wiki2", "c4"]',
    ]


@pytest.mark.parametrize(("name", "rho"), [("concat_merge", 0.0), ("come", 0.9)])
def test_official_name_has_the_official_default(
    name: str, rho: float, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prune.py", "--method", name, "--print_config"])
    with pytest.raises(SystemExit):
        prune_main()
    assert yaml.safe_load(capsys.readouterr().out)["method"]["rho"] == rho


def test_a_switch_takes_no_other_word() -> None:
    switches = {"--refresh"}
    assert normalise(["--refresh", "run"], {}, switches) == ["--refresh=true", "run"]
    assert normalise(["--refresh", "false", "run"], {}, switches) == ["--refresh=false", "run"]
    assert normalise(["run", "--refresh"], {}, switches) == ["run", "--refresh=true"]


def test_words_are_normalised_once() -> None:
    """Further processes get the rewritten words and rewrite them again. What is said beside a file counts."""
    assert words("--granularity", "5", "-c", "a.yaml", "--seed=1", "--config=b.yaml") == [
        *("--config=a.yaml", "--config=b.yaml", "--method.granularity=5", "--seed=1"),
    ]
    once = words("--method", "come_p", "--granularity=5", "--wo_repeat", "--trainer.max-steps", "-1", "--data.tokens=9")
    assert words(*once) == once
    assert once == [
        *("--method.name=come_p", "--method.granularity=5", "--method.wo_repeat=true", "--trainer.max_steps=-1"),
        "--data.tokens=9",
    ]


def test_method_comes_from_flag_then_last_config(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: {name: come_p}")
    (tmp_path / "b.yaml").write_text("method: come")
    first, second = f"--config={tmp_path / 'a.yaml'}", f"--config={tmp_path / 'b.yaml'}"
    assert scan([], "method", "come") == "come"
    assert scan([first], "method", "x") == "come_p"
    assert scan([first, second], "method", "x") == "come"
    assert scan(["--method.name=y", first], "method", "x") == "y"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("prune_*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads(config: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.read_text().startswith(f"# python prune.py --config configs/{config.name}")
    monkeypatch.setattr(sys, "argv", ["prune.py", "--config", str(config), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        prune_main()
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    for group, values in yaml.safe_load(config.read_text()).items():
        chosen = printed[group]
        assert chosen == values if not isinstance(values, dict) else values.items() <= chosen.items()


def test_help_explains_every_option(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prune.py", "--method", "come", "--help"])
    with pytest.raises(SystemExit):
        prune_main()
    page = capsys.readouterr().out
    for option in ("--target_layers", "--sparsity", "--output", "--method.rho", "--method.wo_repeat", "--data.tokens"):
        assert option in page
    assert "Least share of the dominant layer" in page and "Text source" in page
