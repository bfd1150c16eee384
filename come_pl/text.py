"""Text sources and the documents they hold. Knows nothing of models, tokenizers or Lightning.

A source is named in one of three ways:

- ``embedded``: English technical prose that every Python installation carries (no network, no dependency);
- a name of :data:`SOURCES`, read from the Hugging Face Hub: ``wiki2``, ``c4``, ``pg19``, ``bookcorpus``, ...;
- a path: a ``.txt``/``.raw``/``.md``, ``.jsonl`` or ``.parquet`` file, or a folder of such files. A local file is
  read whole for whichever split is asked, so keeping calibration and evaluation files apart is the caller's care.
"""

import ast
import difflib
import functools
import hashlib
import json
import os
import re
import socket
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

Split = Literal["calibration", "distillation", "evaluation"]
SPLITS = get_args(Split)
Row = Mapping[str, Any]

TEXT_SUFFIXES = (".txt", ".raw", ".md")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
TEXT_COLUMNS = ("text",), ("content",), ("instruction", "input", "output"), ("prompt", "completion")
PIECE_CHARS = 100_000  # a large text file is read in pieces of about this size

# Folders of the standard library without prose of their own: tests, bundled wheels, code tables.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings"}
    | {"lib-dynload", "_bundled", "pydoc_data", "__pycache__"}
)
_DOCSTRING_CHARS = 200  # shorter docstrings are one-line summaries, not prose
_PARAGRAPH_CHARS = 40  # shorter paragraphs ("Example:") repeat without leaking text between splits
_CALIBRATION_SHARE, _DISTILLATION_SHARE = 0.25, 0.55  # the rest is for evaluation


class DataError(ValueError):
    """Text or a data setting that cannot be used; the message is one line that says what to do."""


@dataclass(frozen=True)
class Source:
    """A dataset of the Hugging Face Hub."""

    name: str  # what the command line calls it
    path: str  # repository on the Hub
    splits: Mapping[Split, str]  # hub split (or slice of it) that each of our splits reads; one left out is refused
    text: str | Callable[[Row], str] = "text"  # column of the text, or a function from a row to its text
    config: str | None = None
    data_files: dict[str, str] | None = None  # files to read instead of the whole repository, by hub split
    separator: str = "\n\n"  # between two rows when they are joined into one text
    streaming: bool = False  # rows come over the network as they are needed: too large to download

    def row_text(self, row: Row) -> str:
        return self.text(row) if callable(self.text) else row[self.text]


def _alpaca_text(row: Row) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)


def _mmlu_text(row: Row) -> str:
    choices = [f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", row["choices"], strict=False)]
    return "\n".join([row["question"].strip(), *choices, f"Answer: {'ABCDEFGHIJ'[row['answer']]}"])


_TRAIN_TEST: dict[Split, str] = {"calibration": "train", "distillation": "train", "evaluation": "test"}
_C4: dict[Split, str] = {**_TRAIN_TEST, "evaluation": "validation"}
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_BOOKS: dict[Split, str] = {"calibration": "train", "distillation": "train"}  # the Hub has no other split
# One split on the Hub: cut so that our three never share a row.
_TENTH, _REST, _LAST = "train[:10%]", "train[10%:90%]", "train[90%:]"
_ALPACA: dict[Split, str] = {"calibration": _TENTH, "distillation": _REST, "evaluation": _LAST}
# Never the test split for calibration: it is what the benchmark reports.
_MMLU: dict[Split, str] = {"calibration": "validation", "distillation": "auxiliary_train", "evaluation": "test"}

_ALL = (
    # Rows are lines that keep their "\n", empty ones included: "\n\n".join of all of them is the text on which GPTQ,
    # SLEB and most pruning papers calibrate and report perplexity.
    Source("wiki2", "Salesforce/wikitext", _TRAIN_TEST, config="wikitext-2-raw-v1"),
    Source("c4", "allenai/c4", _C4, data_files=_C4_FILES, streaming=True),
    # Parquet mirrors: the originals need a loading script, which `datasets` no longer runs.
    Source("pg19", "emozilla/pg19", _TRAIN_TEST, streaming=True),
    Source("bookcorpus", "rojagtap/bookcorpus", _BOOKS, separator=" ", streaming=True),  # rows are sentences
    Source("alpaca", "yahma/alpaca-cleaned", _ALPACA, text=_alpaca_text),
    Source("mmlu", "cais/mmlu", _MMLU, text=_mmlu_text, config="all"),
)
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
ALIASES = {"wikitext2": "wiki2"}


def iter_documents(name_or_path: str, split: Split, *, lines: bool = False) -> Iterator[str]:
    """Documents of a source, one at a time.

    Args:
        name_or_path: ``embedded``, a name of :data:`SOURCES`, or a path.
        split: Which part to read; local files ignore it.
        lines: Count as the official toolkits do: a document is a non-empty line of a text file, a paragraph of the
            embedded text, a non-empty row elsewhere. Otherwise a text file is one document.

    Raises:
        DataError: Unknown name or split (at once), or a file or dataset that cannot be read (when reached).
    """
    source = _resolve(name_or_path, split)
    if isinstance(source, Source):
        rows = _hub_documents(source, split)
        return (row for row in rows if row.strip()) if lines else rows
    if isinstance(source, Path):
        return (text for file in _files(source) for text in _file_documents(file, lines))
    texts = embedded_documents(split)
    return (paragraph for text in texts for paragraph in text.split("\n\n")) if lines else iter(texts)


def iter_text(name_or_path: str, split: Split) -> Iterator[str]:
    """The source as one running text, in pieces (documents and separators) that never hold a large text file whole."""
    source = _resolve(name_or_path, split)
    if isinstance(source, Source):
        return _joined(([text] for text in _hub_documents(source, split)), source.separator)
    if isinstance(source, Path):
        files = ([_text_pieces(f)] if f.suffix in TEXT_SUFFIXES else ([t] for t in _rows(f)) for f in _files(source))
        return _joined(document for documents in files for document in documents)
    return _joined([text] for text in embedded_documents(split))


def is_streaming(name_or_path: str) -> bool:
    """Whether the source is read over the network row by row, so that choosing rows at random is not possible."""
    source = SOURCES.get(ALIASES.get(name_or_path, name_or_path))
    return source is not None and source.streaming


def _joined(documents: Iterable[Iterable[str]], separator: str = "\n\n") -> Iterator[str]:
    for index, document in enumerate(documents):
        if index:
            yield separator
        yield from document


def _resolve(name_or_path: str, split: Split) -> Source | Path | None:
    """The hub source or path that a name means; ``None`` for the embedded text."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown: expected one of {', '.join(SPLITS)}")
    name = ALIASES.get(name_or_path, name_or_path)
    if name == "embedded":
        return None
    if name in SOURCES:
        if split not in SOURCES[name].splits:
            raise DataError(f"{name} has no part held out for {split}: choose another source or a local file")
        return SOURCES[name]
    if name_or_path and (path := Path(name_or_path).expanduser()).exists():
        return path
    known = ["embedded", *SOURCES, *ALIASES]
    close = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise DataError(
        f"{name_or_path!r} is neither a known source nor an existing path{hint}: known sources are "
        f"{', '.join(known)}; a path to a {', '.join(FILE_SUFFIXES)} file or a folder of them also works"
    )


def embedded_documents(split: Split) -> list[str]:
    """Embedded documents of one split in a fixed order. No two splits share a paragraph."""
    return [text for name, text in _embedded().items() if _embedded_split(name) == split]


def _embedded_split(name: str) -> Split:
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    if share < _CALIBRATION_SHARE:
        return "calibration"
    return "distillation" if share < _CALIBRATION_SHARE + _DISTILLATION_SHARE else "evaluation"


@functools.cache
def _embedded() -> dict[str, str]:
    """All embedded documents by name, each paragraph once: at its first place over all documents."""
    seen: set[str] = set()
    documents = {}
    for name, text in (*_topics(), *_module_docstrings()):
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split()).casefold()
            if not key or (len(key) > _PARAGRAPH_CHARS and key in seen):
                continue
            seen.add(key)
            kept.append(paragraph.strip("\n"))
        if kept:
            documents[name] = "\n\n".join(kept)
    if not documents:
        raise DataError("this Python carries no standard library source, so `embedded` is empty: give a local file")
    return documents


def _topics() -> Iterator[tuple[str, str]]:
    with suppress(ImportError):  # some distributions package it apart
        from pydoc_data.topics import topics

        yield from ((f"topic/{name}", topics[name]) for name in sorted(topics))


def _module_docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        code = file.read_text(encoding="utf-8", errors="replace")
        if '"""' not in code and "'''" not in code:  # no long docstring: parsing it would be time lost
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in someone else's code
            try:
                tree = ast.parse(code)
            except SyntaxError:
                continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        if long := [text for text in texts if text and len(text) > _DOCSTRING_CHARS]:
            yield f"module/{relative.as_posix()}", "\n\n".join(long)


def _hub_documents(source: Source, split: Split) -> Iterator[str]:
    try:
        for row in _hub_rows(source, split):
            yield source.row_text(row)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many kinds: the caller needs one line, whichever it was
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"{source.name} ({source.path}) could not be read: {type(error).__name__}: {reason}; "
            "check the connection, or use `embedded` or a local file"
        ) from error


def _hub_rows(source: Source, split: Split) -> Iterable[Row]:
    online = hub_reachable()
    if not online and not _in_local_cache(source.path):
        raise DataError(
            f"{source.name} needs {source.path} from the Hugging Face Hub, which cannot be reached, and no copy is "
            "cached: use --data.calibration embedded (or --data.source embedded), or the path of a local file"
        )
    with _quick_offline(not online):
        from datasets import load_dataset  # type: ignore[import-untyped]  # slow to import, and only hub sources need it

        reading: dict[str, Any] = {"split": source.splits[split], "streaming": source.streaming and online}
        return load_dataset(source.path, source.config, data_files=source.data_files, **reading)


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the Hub (or the proxy in front of it) accepts a connection within ``seconds``."""
    offline = {os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    if offline & {"1", "ON", "YES", "TRUE"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    proxies = [os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")]
    address = next((proxy for proxy in proxies if proxy), endpoint)
    try:
        url = urlsplit(address if "://" in address else f"http://{address}")
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=seconds).close()
    except (OSError, ValueError):
        return False
    return True


def _in_local_cache(path: str) -> bool:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    home = Path(os.environ.get("HF_HOME") or base).expanduser()
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / path.replace("/", "___")
    downloaded = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"datasets--{path.replace('/', '--')}"
    return prepared.exists() or downloaded.exists()


@contextmanager
def _quick_offline(offline: bool) -> Iterator[None]:
    """Makes `datasets` go to its cache at once instead of retrying a dead connection for minutes."""
    places = [import_module(name) for name in ("datasets.config", "huggingface_hub.constants")] if offline else []
    before = [(place, place.HF_HUB_OFFLINE) for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for place, value in before:
            place.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if files := sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in FILE_SUFFIXES):
            # a data set's own description is no part of it
            return [f for f in files if f.name != "README.md"] if any(f.suffix != ".md" for f in files) else files
        raise DataError(f"{path}: no {', '.join(FILE_SUFFIXES)} file in this folder")
    if path.suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{path}: files of type {path.suffix or '(none)'!r} are not read: use {', '.join(FILE_SUFFIXES)}"
        )
    return [path]


def _file_documents(file: Path, lines: bool) -> Iterator[str]:
    if file.suffix not in TEXT_SUFFIXES:
        yield from (text for text in _rows(file) if text.strip())
    elif lines:
        with _readable(file), file.open(encoding="utf-8") as stream:
            yield from (line.strip() for line in stream if line.strip())
    else:
        yield "".join(_text_pieces(file))


def _text_pieces(file: Path) -> Iterator[str]:
    """A text file in pieces of about :data:`PIECE_CHARS` characters, cut after an empty line where there is one."""
    with _readable(file), file.open(encoding="utf-8") as stream:
        while piece := stream.read(PIECE_CHARS):
            parts = [piece]
            size = 0
            while size < PIECE_CHARS and (line := stream.readline(PIECE_CHARS)):
                parts.append(line)
                size += len(line)
                if not line.strip():
                    break
            yield "".join(parts)


def _rows(file: Path) -> Iterator[str]:
    return _jsonl_rows(file) if file.suffix == ".jsonl" else _parquet_rows(file)


def _jsonl_rows(file: Path) -> Iterator[str]:
    with _readable(file), file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}:{number}: not valid JSON ({error.msg}): one object a line is expected"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number}: expected a JSON object with a text, found {type(row).__name__}")
            yield _row_text(row, f"{file}:{number}")


def _parquet_rows(file: Path) -> Iterator[str]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = _text_columns(table.schema_arrow.names, str(file))
        for batch in table.iter_batches(batch_size=256, columns=list(columns)):
            for row in batch.to_pylist():
                yield _row_text(row, str(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _row_text(row: Row, where: str) -> str:
    parts = [row[column] or "" for column in _text_columns(row, where) if column in row]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"{where}: the text is not a string but {type(parts[0]).__name__}")
    return "\n".join(part for part in parts if part)


def _text_columns(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The columns whose values, joined, are a row's text."""
    present = list(names)
    for columns in TEXT_COLUMNS:
        if columns[0] in present and columns[-1] in present:
            return tuple(column for column in columns if column in present)
    raise DataError(
        f"{where}: no text column among {', '.join(present) or 'none'}: rename one to 'text' "
        "(also read: content, instruction + input + output, prompt + completion)"
    )


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise DataError(f"{file}: byte 0x{bad:02x} is not UTF-8 text: convert the file to UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
