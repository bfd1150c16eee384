"""Perplexity and tasks of one model, next to the dense one; what was measured before is not measured again, and stays
in the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import come_pl
from come_pl import locks, models
from come_pl.data import TokenWindows, token_windows
from come_pl.evaluation.perplexity import perplexity, strided
from come_pl.evaluation.zeroshot import TASKS, TaskError, TaskRunner, mean_score, read_task
from come_pl.record import versions, write_atomically
from come_pl.report.style import number, percent
from come_pl.runs import RunError
from come_pl.windows import check_readable
from come_pl.workflows.subject import check_output, described, device_of, load_pair, read_pair
from come_pl.workflows.tables import markdown, write_json

ROOT = Path("runs/eval")


class Cache:
    """Results by everything that decides them, one small file each, written whole or not at all."""

    def __init__(self, folder: Path, refresh: bool = False):
        self.folder, self.refresh = folder, refresh

    def get(self, key: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is known under `key`, or else what `measure` finds."""
        words = json.dumps(key, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.json"
        if file.is_file() and not self.refresh:
            try:
                return json.loads(file.read_text(encoding="utf-8"))["value"]
            except (ValueError, KeyError):
                pass  # damaged: measured again
        value = measure()
        write_json(file, {"key": key, "value": value})
        return value


def evaluate(
    model: str,
    dense: str | None = None,
    texts: list[str] | None = None,
    tokens: int = 16384,
    seqlen: int = 512,
    stride: int | None = None,
    tasks: list[str] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    output: Path | None = None,
    cache: Path = ROOT / "cache",
    refresh: bool = False,
) -> dict[str, Any]:
    """Measure a model, and write `eval.json` and `eval.md`, in its run folder if it has one, after every result.

    Each result is kept in `cache` by the model's hash and all that decides it, so that the same command goes on after
    a kill, and a dense model is measured once for all that came from it. Texts and tasks that the file has of earlier
    calls stay there, if they were measured on the same models and the texts in the same windows.

    Args:
        model: A run folder, a folder with a checkpoint, a .gguf file or a hub id.
        dense: The dense model to compare with, measured the same way; `auto`: the one that the run began with.
        texts: Text sources for perplexity; `embedded` by default, `none` for no text.
        tokens: Tokens of each text.
        seqlen: Tokens in a window.
        stride: Windows overlap and are this many tokens apart; without it they follow each other.
        tasks: Tasks or groups of lm-eval, NAME or NAME=SHOTS; arc_challenge, arc_easy, hellaswag, openbookqa, piqa,
            winogrande and mmlu=5 by default, `none` for no task.
        include_path: Folder with lm-eval task files of one's own.
        limit: Questions of each task (each subject of MMLU); all by default.
        batch_size: Windows or questions that go through the model at once.
        dtype: auto (float32 on a CPU, elsewhere the checkpoint's own, of the dense model if there is one), float32,
            bfloat16 or float16.
        device: auto, cpu or cuda.
        output: JSON file; the Markdown is beside it. RUN/eval.json by default, or runs/eval/ for a plain checkpoint.
        cache: Folder of results.
        refresh: Measure again what the cache holds.

    Raises:
        ValueError: one of the package's own errors, all of which are one clear line.
    """
    for name, value in {"tokens": tokens, "seqlen": seqlen, "batch_size": batch_size, "limit": limit}.items():
        if value is not None and value < 1:
            raise RunError(f"{name} {value}: expected at least 1")
    asked, sources = [read_task(task) for task in _chosen(tasks, TASKS)], _chosen(texts, ("embedded",))
    if not asked and not sources:
        raise RunError("nothing to measure: --texts none and --tasks none; give a text or a task")
    models.resolve_dtype(dtype, accelerated=False)
    subject, reference = read_pair(model, dense)
    where = device_of(device)
    store = Cache(cache, refresh)
    tokenizer = models.load_tokenizer(subject.path)
    config = models.load_config(subject.path).get_text_config(decoder=True)
    bos = models.needs_bos(config, tokenizer)
    texts_cut = {text: Text.cut(text, tokenizer, tokens, seqlen, stride, bos) for text in sources}
    for one in (subject, reference) if reference else (subject,):
        check_readable([text.source for text in texts_cut.values()], models.load_config(one.path), one.path)
    file = output or subject.output(ROOT, "eval")
    check_output(file)
    runner = TaskRunner(asked, include_path) if asked else None  # last: lm-eval takes long to import
    loaded = load_pair(subject, reference, dtype, where)
    if reference is not None:
        sizes = {which: m.get_output_embeddings().weight.shape[0] for which, m in loaded.items()}
        if sizes["model"] != sizes["dense"]:
            raise RunError(
                f"--dense {reference.path!r} has {sizes['dense']} tokens, {subject.path!r} has {sizes['model']}: "
                "expected the model that it was made from"
            )
    paths = {"model": subject.path, "dense": reference.path if reference else ""}
    windows = {"seqlen": seqlen, "stride": stride, "bos": bos}
    info: dict[str, Any] = {
        **{which: described(paths[which], measured) for which, measured in loaded.items()},
        "settings": windows | {"tokens": tokens, "limit": limit},
        "command": " ".join(["come-eval", *sys.argv[1:]]),
        "versions": versions() | ({"lm_eval": runner.version} if runner else {}),
        "perplexity": {},
        "tasks": {},
        "failed": {},
    }

    def key(which: str) -> dict[str, Any]:
        return {"model": info[which]["fingerprint"], "dtype": info[which]["dtype"], "device": where.type}

    def text_key(text: str, divergence: bool) -> dict[str, Any]:
        found = windows | {"text": texts_cut[text].source.fingerprint, "come_pl": come_pl.__version__}
        return found | ({"kl_to": info["dense"]["fingerprint"]} if divergence else {})

    for text in texts_cut:
        entry: dict[str, Any] = {}
        for which, measured in loaded.items():
            other = loaded.get("dense") if which == "model" else None
            identity = key(which) | text_key(text, other is not None)
            title = f"{which} perplexity on {Path(text).name}"
            entry[which] = store.get(
                identity, partial(_perplexity, measured, other, texts_cut[text], batch_size=batch_size, title=title)
            )
        if "dense" in entry:
            entry["quality_kept"] = _share(entry["dense"]["token"], entry["model"]["token"])
        info["perplexity"][text] = entry
        written = _write(file, info)
    for task in asked:
        assert runner is not None
        scores: dict[str, Any] = {"shots": task.shots, "limit": limit}
        try:
            for which, measured in loaded.items():
                ask = partial(_score_of, runner, measured, tokenizer, task, limit=limit, batch_size=batch_size)
                scores[which] = store.get(key(which) | runner.identity(task) | {"limit": limit}, ask)
        except TaskError as error:
            info["failed"][task.name] = " ".join(str(error).split())
            print(f"failed: {info['failed'][task.name]}", file=sys.stderr)
        else:
            if "dense" in scores:
                scores["kept"] = _share(scores["model"]["score"], scores["dense"]["score"])
            info["tasks"][task.name] = scores
        written = _write(file, info)
    print(report(written))
    print(f"written to {file}")
    return written


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Within it no other command writes `file`; without effect where the system or the file system knows no locks."""
    if not locks.KNOWN:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f".{file.name}.lock")
    while True:
        held = open(lock, "w")  # noqa: SIM115  # longer than this line
        locks.lock(held.fileno(), wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(held.fileno())):
                break
        held.close()  # whoever had it took it away
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.close()


def _merged(file: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """`info`, what this call has measured, with what the file has of other calls; what does not go with it is told and
    left out."""
    found = dict(info) | {"settings": dict(info["settings"]), "versions": dict(info["versions"])}
    known, scored = _known(file, found, texts=bool(info["perplexity"]))
    found |= {"perplexity": known | info["perplexity"], "tasks": scored | info["tasks"]}
    return found | ({"average": average(found["tasks"])} if found["tasks"] else {})


def _known(file: Path, info: dict[str, Any], texts: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(perplexity, tasks) in the file that go with `info`, into which their settings and version go too.

    Args:
        texts: whether `info` has the settings of its own texts' windows.
    """
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        same, settings, known = _models(old) == _models(info), dict(old["settings"]), dict(old["perplexity"])
        scored = {name: {"limit": settings.get("limit")} | task for name, task in old["tasks"].items()}
        lm_eval = old["versions"].get("lm_eval")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}  # none, or of another kind
    if not same:
        print(f"{file}: replaced, as it was of another model or dense model, or of another dtype")
        return {}, {}
    windows = {name: settings.get(name) for name in info["settings"] if name != "limit"}
    if not texts:
        info["settings"] |= windows
    if known and not windows.items() <= info["settings"].items():
        said = ", ".join(f"{name} {value}" for name, value in windows.items() if value != info["settings"][name])
        print(f"{file}: perplexity measured with {said} is replaced")
        known = {}
    if scored and info["versions"].setdefault("lm_eval", lm_eval) != lm_eval:
        print(f"{file}: tasks measured with lm-eval {lm_eval} are replaced")
        scored = {}
    return known, scored


def _models(info: Mapping[str, Any]) -> list[Any]:
    return [info.get(which) and [info[which][key] for key in ("fingerprint", "dtype")] for which in ("model", "dense")]


@dataclass
class Text:
    """A text cut into windows: ids, mask and counted (windows, seqlen), its tokens and its words."""

    source: TokenWindows
    ids: Tensor
    mask: Tensor
    counted: Tensor | None
    tokens: int

    @classmethod
    def cut(cls, source: str, tokenizer: Any, tokens: int, seqlen: int, stride: int | None, bos: bool) -> Text:
        """Windows one after the other or, with a stride, overlapping; each begun with BOS if the model needs it."""
        found = token_windows(
            source, tokenizer, split="evaluation", tokens=tokens, seqlen=seqlen, bos=bos and stride is None
        )
        if stride is None:
            return cls(found, found.input_ids, found.mask, None, found.tokens - bos * len(found))
        first = tokenizer.bos_token_id if bos else None
        return cls(found, *strided(found.input_ids.flatten(), seqlen, stride, first), found.tokens)


def _perplexity(model: Any, dense: Any, text: Text, **options: Any) -> dict[str, Any]:
    found = perplexity(model, text.ids, text.mask, counted=text.counted, dense=dense, **options)
    words = text.source.words or 1
    return found.to_dict() | {"word": round(found.word(text.tokens, words), 4), "words": words}


def _score_of(runner: TaskRunner, *arguments: Any, **options: Any) -> dict[str, Any]:
    return runner.score(*arguments, **options).to_dict()


def _chosen(given: list[str] | None, default: tuple[str, ...]) -> list[str]:
    """`none` by itself is an empty list."""
    return [] if given == ["none"] else list(dict.fromkeys(default if given is None else given))


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole and math.isfinite(part) and math.isfinite(whole) else None


def average(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean score of the tasks (MMLU is one), its standard error, and the share of the dense model's mean kept."""
    found: dict[str, Any] = {"tasks": len(tasks)}
    for which in ("model", "dense"):
        scores = [task[which] for task in tasks.values() if which in task]
        if scores:
            found[which] = {name: round(value, 6) for name, value in mean_score(scores).items()}
    if "dense" in found:
        found["kept"] = _share(found["model"]["score"], found["dense"]["score"])
    return found


def _write(file: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Write what this call has measured, and what others have meanwhile; returns both."""
    with _alone(file):
        found = _merged(file, info)
        write_json(file, found)
        write_atomically(file.with_suffix(".md"), report(found))
    return found


def report(info: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    both = "dense" in info
    model, settings = info["model"], info["settings"]
    lines = [f"# {model['path']}: {model['layers']} layers, {model['parameters'] / 1e6:.1f}M parameters\n"]
    if both:
        dense = info["dense"]
        lines.append(
            f"Dense: {dense['path']}, {dense['layers']} layers, {dense['parameters'] / 1e6:.1f}M parameters.\n"
        )
    if info["perplexity"]:
        columns = ["text", "tokens", "perplexity", "per word"]
        columns += ["dense", "dense per word", "quality kept", "KL to dense"] if both else []
        rows = []
        for text, entry in info["perplexity"].items():
            mine = entry["model"]
            row = [Path(text).name, mine["tokens"], number(mine["token"]), number(mine["word"])]
            if both:
                theirs = entry["dense"]
                row += [number(theirs["token"]), number(theirs["word"]), percent(entry["quality_kept"])]
                row.append(number(mine["kl"], 3))
            rows.append(row)
        way = f"strided by {settings['stride']}" if settings["stride"] else "one after the other"
        begun = ", each begun with BOS" if settings["bos"] else ""
        lines += [markdown(columns, rows), f"Windows of {settings['seqlen']} tokens, {way}{begun}.\n"]
    if info["tasks"]:
        columns = ["task", "shots", "metric", "questions", "score"] + (["dense", "kept"] if both else [])
        rows = []
        for name, task in info["tasks"].items():
            row = [name, task["shots"], task["model"]["metric"], task["model"]["samples"], _score(task["model"])]
            rows.append(row + ([_score(task["dense"]), percent(task["kept"])] if both else []))
        mean = info["average"]
        row = ["average", "", "", "", _score(mean["model"])]
        rows.append(row + ([_score(mean["dense"]), percent(mean["kept"])] if both else []))
        lines.append(markdown(columns, rows))
        lines.append(f"lm-eval {info['versions']['lm_eval']}; ± is one standard error.\n")
    lines += [f"Failed: {line}\n" for line in info["failed"].values()]
    return "\n".join(lines)


def _score(score: Mapping[str, Any]) -> str:
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['score']:.1f}{error}"
