"""Text sources, windows, samplers and the data modules: no network, no model, a tokenizer made here."""

import hashlib
import json
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from come_pl import data as come_data
from come_pl import windows as come_windows
from come_pl.data import (
    CalibrationData,
    DistillationData,
    ResumableSampler,
    StrideSampler,
    WindowDataset,
    token_windows,
)
from come_pl.text import DataError, hub_reachable, iter_documents, iter_text

BOS, PAD, UNK = 0, 1, 2
FIRST = 3  # id of the word "w0"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: "w7" has id FIRST + 7, any other word is unknown."""
    vocab = {"<s>": BOS, "<pad>": PAD, "<unk>": UNK, **{f"w{i}": FIRST + i for i in range(2000)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", unk_token="<unk>", model_max_length=16
    )


@pytest.fixture
def counting(tmp_path: Path) -> str:
    """A text file of the words w0 … w1999, ten to a paragraph, so that a token tells its place."""
    lines = [" ".join(f"w{i}" for i in range(begin, begin + 10)) for begin in range(0, 2000, 10)]
    path = tmp_path / "counting.txt"
    path.write_text("\n\n".join(lines))
    return str(path)


def firsts(ids: torch.Tensor) -> list[int]:
    """Number of the first word of each window."""
    return (ids[:, 0] - FIRST).tolist()


def test_embedded_splits_share_no_paragraph():
    splits = {}
    for split in ("calibration", "distillation", "evaluation"):
        paragraphs = iter_documents("embedded", split, lines=True)
        keys = [" ".join(p.split()).lower() for p in paragraphs]
        splits[split] = [key for key in keys if len(key) > 40]
        assert len(set(splits[split])) == len(splits[split])
    total = sum(map(len, splits.values()))
    assert sum(len(p) for part in splits.values() for p in part) > 500_000
    assert len(set().union(*splits.values())) == total
    assert 0.1 < len(splits["calibration"]) / total < 0.4 < len(splits["distillation"]) / total < 0.7


def test_running_text_is_the_documents_joined(tmp_path: Path):
    assert "".join(iter_text("embedded", "evaluation")) == "\n\n".join(iter_documents("embedded", "evaluation"))
    long = "\n\n".join(f"paragraph {i} " + "x" * 90 for i in range(4000))
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"instruction": "do", "output": "done"}\n{"content": "c"}\n')
    pieces = list(iter_text(str(tmp_path), "calibration"))
    assert "".join(pieces) == "\n\n".join([long, "one", "do\ndone", "c"])
    assert max(map(len, pieces)) < 110_000
    assert all(piece.endswith("\n\n") for piece in pieces[:2])
    assert list(iter_documents(str(tmp_path), "calibration")) == [long, "one", "do\ndone", "c"]


def test_the_description_of_a_data_set_is_none_of_its_texts(tmp_path: Path):
    (tmp_path / "README.md").write_text("about it")
    assert list(iter_documents(str(tmp_path), "calibration")) == ["about it"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.md").write_text("two")
    assert list(iter_documents(str(tmp_path), "calibration")) == ["one", "two"]


def test_parquet_is_read(tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(iter_documents(str(tmp_path / "a.parquet"), "distillation")) == ["one", "two"]
    parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet: no text column among id"):
        list(iter_documents(str(tmp_path / "b.parquet"), "distillation"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9 au lait", r"bad.txt: byte 0xe9 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl:2: not valid JSON"),
        ("column.jsonl", b'{"title": "a"}\n', r"column.jsonl:1: no text column among title"),
        ("number.jsonl", b'{"text": 3}\n', r"number.jsonl:1: the text is not a string"),
        ("list.jsonl", b"[1]\n", r"list.jsonl:1: expected a JSON object"),
        ("fake.parquet", b"not parquet", r"fake.parquet: not a readable Parquet file"),
        ("a.pdf", b"", r"a.pdf: files of type '.pdf' are not read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(iter_documents(str(tmp_path / name), "calibration"))
    assert "\n" not in str(raised.value)


def test_unknown_names(tmp_path: Path):
    with pytest.raises(DataError, match=r"did you mean 'wiki2'.*bookcorpus.*a path"):
        iter_documents("wiki22", "calibration")
    with pytest.raises(DataError, match="split 'train' is unknown"):
        iter_documents("embedded", "train")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="bookcorpus has no part held out for evaluation"):
        iter_documents("bookcorpus", "evaluation")
    with pytest.raises(DataError, match="no .txt"):
        list(iter_documents(str(tmp_path), "calibration"))


@pytest.mark.parametrize("name", ["wiki2", "c4"])
def test_unreachable_hub_says_how_to_go_on(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for variable in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    begin = time.monotonic()
    with pytest.raises(DataError, match=rf"^{name} .*--data.calibration embedded"):
        next(iter_documents(name, "calibration"))
    assert time.monotonic() - begin < 10


def test_hub_check_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
        assert hub_reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_reachable()


def test_budget_order_and_bos(counting: str, tokenizer: PreTrainedTokenizerFast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows = token_windows(counting, tokenizer, split="calibration", tokens=645, seqlen=64)
    assert windows.input_ids.shape == windows.mask.shape == (10, 64)
    assert windows.input_ids.dtype == torch.int64 and windows.tokens == windows.words == 640
    begins = firsts(windows.input_ids)
    assert len(set(begins)) == 10 and all(b % 64 == 0 for b in begins) and begins != sorted(begins)
    assert max(begins) > 640  # drawn from more than the head of the text

    first = token_windows(counting, tokenizer, split="evaluation", tokens=640, seqlen=64, seed=3)
    assert first.input_ids.flatten().tolist() == list(range(FIRST, FIRST + 640))
    begun = token_windows(counting, tokenizer, split="evaluation", tokens=640, seqlen=64, bos=True)
    assert begun.input_ids[:, 0].tolist() == [BOS] * 10
    assert begun.input_ids[:, 1:].flatten().tolist() == list(range(FIRST, FIRST + 630)) and begun.words == 630


def test_text_in_many_pieces_is_cut_as_one(
    counting: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    whole = token_windows(counting, tokenizer, split="evaluation", tokens=1900, seqlen=19)
    calls: list[str] = []
    chunks = come_windows._chunks

    def spy(pieces: Iterable[str], chars: int) -> Iterator[str]:
        for chunk in chunks(pieces, chars):
            calls.append(chunk)
            yield chunk

    monkeypatch.setattr("come_pl.text.PIECE_CHARS", 200)
    monkeypatch.setattr("come_pl.windows.CHUNK_CHARS", (300, 300))
    monkeypatch.setattr("come_pl.windows._chunks", spy)
    pieces = token_windows(counting, tokenizer, split="evaluation", tokens=1900, seqlen=19)
    assert pieces.fingerprint == whole.fingerprint and len(calls) > 10
    calls.clear()
    token_windows(counting, tokenizer, split="evaluation", tokens=38, seqlen=19)
    assert len(calls) == 1  # the rest of the file is neither read nor tokenised


def test_seed_decides(counting: str, tokenizer: PreTrainedTokenizerFast):
    settings: dict = {"split": "calibration", "tokens": 640, "seqlen": 64}
    a, b, c = (token_windows(counting, tokenizer, seed=seed, **settings).fingerprint for seed in (0, 0, 1))
    assert a == b != c


def test_embedded_is_the_same_in_another_process():
    code = (
        "import hashlib; from come_pl.text import iter_text; "
        "print(hashlib.sha256(''.join(iter_text('embedded', 'calibration')).encode()).hexdigest())"
    )
    here = hashlib.sha256("".join(iter_text("embedded", "calibration")).encode()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_documents_as_padded_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = tmp_path / "lines.txt"
    path.write_text("w0 w1 w2\n\nw3\n" + " ".join(f"w{i}" for i in range(4, 30)) + "\n")
    windows = token_windows(str(path), tokenizer, split="evaluation", tokens=24, seqlen=8, packed=False, bos=True)
    assert windows.input_ids.tolist() == [
        [BOS, FIRST, FIRST + 1, FIRST + 2, PAD, PAD, PAD, PAD],
        [BOS, FIRST + 3, PAD, PAD, PAD, PAD, PAD, PAD],
        [BOS, *range(FIRST + 4, FIRST + 11)],
    ]
    assert windows.mask.sum(1).tolist() == [4, 2, 8] and windows.tokens == 14 and windows.words == 11
    assert windows.mask[0].tolist() == [True] * 4 + [False] * 4


def test_nsamples_counts_documents(counting: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    windows = token_windows(counting, tokenizer, split="calibration", tokens=1, seqlen=20, nsamples=7)
    words = (windows.input_ids.flatten() - FIRST).tolist()
    assert len(windows) == 3  # 7 lines of 10 words fill 3 windows of 20
    assert all(words[i + 1] - words[i] == 1 for i in range(60) if i % 10 != 9)  # whole lines
    lines = [word // 10 for word in words[::10]]
    assert len(set(lines)) == 6 and lines != sorted(lines)
    each = token_windows(counting, tokenizer, split="calibration", tokens=1, seqlen=20, nsamples=7, packed=False)
    assert each.mask.sum(1).tolist() == [10] * 7
    with pytest.warns(UserWarning, match="only 200 of the 300 documents"):
        token_windows(counting, tokenizer, split="calibration", tokens=1, seqlen=20, nsamples=300)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"w{i} w{i}"}) for i in range(5)))
    assert len(token_windows(str(rows), tokenizer, split="calibration", tokens=1, seqlen=2, nsamples=4)) == 4


def test_too_little_text(counting: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    with pytest.raises(DataError, match="too short for one window of 4000"):
        token_windows(counting, tokenizer, split="calibration", tokens=4000, seqlen=4000)
    with pytest.warns(UserWarning, match="only 4 of the 6 windows of 500"):
        assert len(token_windows(counting, tokenizer, split="calibration", tokens=3000, seqlen=500)) == 4
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="too short"):
        token_windows(str(tmp_path / "empty.txt"), tokenizer, split="evaluation", tokens=8, seqlen=8)


@pytest.mark.parametrize("bad", [{"tokens": 3}, {"seqlen": 0}, {"nsamples": 0}, {"seqlen": 1, "bos": True}])
def test_bad_settings(bad: dict, counting: str, tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(DataError):
        token_windows(counting, tokenizer, **{"split": "calibration", "tokens": 8, "seqlen": 4, **bad})


@pytest.fixture
def dataset(counting: str, tokenizer: PreTrainedTokenizerFast) -> WindowDataset:
    return WindowDataset(token_windows(counting, tokenizer, split="evaluation", tokens=110, seqlen=10))  # 11 windows


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stride_sampler_reads_each_window_once(world: int, dataset: WindowDataset):
    ranks = [list(StrideSampler(dataset, world, rank)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) == len(StrideSampler(dataset, world)) == -(
        -11 // world
    )
    read = [index for rank in ranks for index in rank]
    assert sorted(index for index in read if index < 11) == list(range(11))
    assert sum(int(dataset[index]["mask"].sum()) for index in read) == 110
    whole = [list(StrideSampler(dataset, world, rank, batch_size=4)) for rank in range(world)]
    assert {len(rank) for rank in whole} == {{1: 12, 2: 8, 3: 4}[world]}
    assert sorted(index for rank in whole for index in rank if index < 11) == list(range(11))


def test_global_batches_do_not_depend_on_world_size(dataset: WindowDataset):
    def batches(world: int, epoch: int = 0, seed: int = 0, start: int = 0) -> list[set[int]]:
        samplers = [ResumableSampler(dataset, world, rank, seed) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            sampler.start = start
        ranks = [list(sampler) for sampler in samplers]
        share = 6 // world
        return [set().union(*(rank[k : k + share] for rank in ranks)) for k in range(0, len(ranks[0]), share)]

    assert set().union(*batches(1)) == set(range(11))
    for world in (2, 3):
        assert batches(world)[0] == batches(1)[0]
        assert batches(world)[1] >= batches(1)[1]  # completed with windows read before
        assert batches(world, start=6) == batches(world)[1:]
    assert batches(1, epoch=1) != batches(1) != batches(1, seed=1)
    assert batches(1, start=11) == batches(1)


def test_permutations_come_again_after_a_period(dataset: WindowDataset):
    sampler, orders = ResumableSampler(dataset), []
    sampler.period = 2
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] == orders[3]


def test_calibration_data(counting: str, tokenizer: PreTrainedTokenizerFast):
    data = CalibrationData(counting, tokens=70, seqlen=10, batch_size=2)
    with pytest.raises(DataError, match="attach"):
        data.train_dataloader()
    windows = data.attach(tokenizer, bos=False, seed=0)
    assert data.attach(tokenizer, bos=False, seed=0) is windows is data.windows
    batches = list(data.train_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), windows.input_ids)
    assert data.attach(tokenizer, bos=False, seed=1).fingerprint != windows.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_is_never_trained_on(streaming: bool, counting: str, tokenizer: PreTrainedTokenizerFast):
    data = DistillationData(counting, tokens=1000, seqlen=10, validation_tokens=200, streaming=streaming)
    data.attach(tokenizer, bos=False, seed=0)
    held = [begin for batch in data.val_dataloader() for begin in firsts(batch["input_ids"])]
    trained = [begin for batch in data.train_dataloader() for begin in firsts(batch["input_ids"])]
    assert len(held) == len(set(held)) == 20 and len(trained) == len(set(trained)) == 100
    assert not set(held) & set(trained)
    if streaming:
        assert held == list(range(0, 200, 10)) and trained == list(range(200, 1200, 10))


def test_short_source_is_shared_out(counting: str, tokenizer: PreTrainedTokenizerFast):
    data = DistillationData(counting, tokens=4000, seqlen=100, validation_tokens=1000)
    with pytest.warns(UserWarning, match="only 18 of the 40 windows"), pytest.warns(UserWarning, match="validation"):
        data.attach(tokenizer, bos=False, seed=0)
    assert len(data.windows or ()) == 18 and len(data.validation or ()) == 2
    enough = DistillationData(counting, tokens=1200, seqlen=100, validation_tokens=1000)
    with pytest.warns(UserWarning, match="for validation, gives only 8 of the 10 windows"):
        enough.attach(tokenizer, bos=False, seed=0)
    assert len(enough.windows or ()) == 12 and len(enough.validation or ()) == 8  # what was asked for to train on
    with pytest.raises(DataError, match="validation_tokens 99: expected at least one window of seqlen 100"):
        DistillationData(counting, tokens=1200, seqlen=100, validation_tokens=99).attach(tokenizer, bos=False, seed=0)
    single = DistillationData(counting, tokens=2000, seqlen=2000, validation_tokens=2000)
    with pytest.raises(DataError, match="too short"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        single.attach(tokenizer, bos=False, seed=0)


def test_stream_begins_again_and_is_dealt_to_ranks(counting: str, tokenizer: PreTrainedTokenizerFast):
    def stream(world: int, rank: int, start: int = 0, windows: int = 25) -> list[int]:
        data = come_data.StreamingWindows(
            counting, "distillation", come_windows.Cutter(tokenizer, 100), windows, 1, world, rank
        )
        data.start = start
        read = [int(item["input_ids"][0]) - FIRST for item in data]
        assert len(read) == len(data) - start // world
        return read

    with pytest.warns(UserWarning, match="only 19 of the 25 windows .* again"):
        whole = stream(1, 0)
    assert whole == [*range(100, 2000, 100), *range(100, 700, 100)]
    assert stream(2, 0, windows=10) == whole[0:10:2] and stream(2, 1, windows=11) == whole[1:10:2]
    assert stream(2, 1, start=4, windows=10) == whole[5:10:2]


class Recorder(pl.LightningModule):
    """Notes the first word of every window that it is trained on."""

    def __init__(self, stop_before: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.stop_before = stop_before

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(self.seen) == self.stop_before:
            raise RuntimeError("interrupted")
        self.seen.append(firsts(batch["input_ids"]))
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(folder: Path, model: Recorder, data: DistillationData, resume: Path | None = None, **limits: int) -> None:
    every = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_exception=True)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "callbacks": [every], "logger": False, "num_sanity_val_steps": 0},
        **{"enable_progress_bar": False, "enable_model_summary": False, **limits},
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=False)


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 12}])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore::DeprecationWarning")
def test_resume_goes_on_with_the_next_batch(
    streaming: bool, limits: dict, counting: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    def data() -> DistillationData:  # 7 windows: batches of 2, 2, 2, 1
        made = DistillationData(counting, 70, 10, batch_size=2, validation_tokens=20, streaming=streaming)
        made.attach(tokenizer, bos=False, seed=5)
        return made

    whole = Recorder()
    _fit(tmp_path, whole, data(), **limits)
    epochs = [whole.seen[begin : begin + 4] for begin in (0, 4, 8)]
    assert all(len({begin for batch in epoch for begin in batch}) == 7 for epoch in epochs)
    assert streaming or epochs[0] != epochs[1] != epochs[2]
    for step in range(1, 12):
        rest = Recorder()
        _fit(tmp_path / "again", rest, data(), tmp_path / f"step={step}.ckpt", **limits)
        assert rest.seen == whole.seen[step:], f"resumed after step {step}"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore::DeprecationWarning")
def test_resume_of_limited_epochs(streaming: bool, counting: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    """Two of four batches an epoch: the next epoch begins with its own first, wherever the run was cut."""
    limits = {"max_epochs": 3, "limit_train_batches": 2}
    data = DistillationData(counting, 80, 10, batch_size=2, validation_tokens=20, streaming=streaming)
    data.attach(tokenizer, bos=False, seed=5)
    assert (data.batches(2), data.batches(0.25), data.batches(1.0), data.batches(9)) == (2, 1, 4, 4)
    whole = Recorder()
    _fit(tmp_path, whole, data, **limits)
    assert len(whole.seen) == 6 and not streaming or whole.seen[:2] == whole.seen[2:4]
    for step in range(1, 6):
        rest = Recorder()
        _fit(tmp_path / "again", rest, data, tmp_path / f"step={step}.ckpt", **limits)
        assert rest.seen == whole.seen[step:], f"resumed after step {step}"


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore::DeprecationWarning")
def test_a_failed_step_is_done_again(counting: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    data = DistillationData(counting, 80, 10, batch_size=2, validation_tokens=20)
    data.attach(tokenizer, bos=False, seed=5)
    whole, broken, rest = Recorder(), Recorder(stop_before=6), Recorder()
    _fit(tmp_path / "whole", whole, data, max_epochs=2)
    with pytest.raises(RuntimeError, match="interrupted"):
        _fit(tmp_path / "broken", broken, data, max_epochs=2)
    latest = max((tmp_path / "broken").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    _fit(tmp_path / "rest", rest, data, latest, max_epochs=2)
    assert broken.seen + rest.seen == whole.seen
