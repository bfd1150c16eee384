"""Documents → token windows → Lightning data modules.

One cutter serves calibration, distillation and perplexity, so that a token budget means the same everywhere:

>>> windows = token_windows("embedded", tokenizer, split="calibration", tokens=32768, seqlen=512)  # doctest: +SKIP
>>> windows.input_ids.shape  # doctest: +SKIP
torch.Size([64, 512])
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from come_pl.text import DataError, Split, is_streaming, iter_documents, iter_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 16  # windows are drawn from this many times the budget, so that they do not all come from the first document
POOL_TOKENS = 2**24  # ... and from no more than this (128 MiB of ids), unless the budget itself is larger
CHUNK_CHARS = 100_000, 8_000_000  # text tokenised in one call, least and most
CHARS_A_TOKEN = 6  # above the usual 4: one call mostly suffices, and its end cuts no word of the text that is used


@dataclass
class TokenWindows:
    """Equal windows of tokens, on the CPU.

    Attributes:
        input_ids: ``(windows, seqlen)`` int64.
        mask: ``(windows, seqlen)`` bool, ``False`` on padding.
        source: Name or path of the text.
        count_words: Counts the words of the windows' text; ``None`` when no tokenizer is at hand.
    """

    input_ids: Tensor
    mask: Tensor
    source: str
    count_words: Callable[[], int] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.mask.sum())

    @cached_property
    def words(self) -> int | None:
        """Whitespace-separated words of the decoded windows, counted when first asked for."""
        return self.count_words() if self.count_words else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids and mask: equal fingerprints are equal windows in equal order."""
        return hashlib.sha256(self.input_ids.numpy().tobytes() + self.mask.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Cutter:
    """Cuts text into windows of ``seqlen`` tokens, each begun by the BOS token when ``bos``."""

    tokenizer: "PreTrainedTokenizerBase"
    seqlen: int
    bos: bool = False

    def __post_init__(self) -> None:
        if self.seqlen < 1 + self.bos:
            raise DataError(f"seqlen is {self.seqlen}: expected at least {1 + self.bos}")
        if self.bos and self.tokenizer.bos_token_id is None:
            raise DataError("bos is asked for, but the tokenizer has no BOS token: set it to False")

    def count(self, tokens: int) -> int:
        """Windows in a token budget."""
        if tokens < self.seqlen:
            raise DataError(f"{tokens} tokens are less than one window of seqlen {self.seqlen}: raise tokens")
        return tokens // self.seqlen

    def blocks(self, pieces: Iterable[str], windows: int | None = None) -> Iterator[Tensor]:
        """Consecutive windows of a running text, ``(some, seqlen)`` at a time, tokenised as far as they are read."""
        least, most = CHUNK_CHARS
        chars = most if windows is None else min(max(windows * self.seqlen * CHARS_A_TOKEN, least), most)
        body = self.seqlen - self.bos
        ids: list[int] = []
        for text in _chunks(pieces, chars):
            ids += self._ids(text)
            whole = len(ids) // body * body
            yield self._begun(torch.tensor(ids[:whole], dtype=torch.long).view(-1, body), self.tokenizer.bos_token_id)
            ids = ids[whole:]

    def packed(self, pieces: Iterable[str], windows: int | None = None) -> Tensor:
        """The first ``windows`` windows (all, without it) of a running text, ``(windows, seqlen)``."""
        blocks = [torch.empty(0, self.seqlen, dtype=torch.long)]
        for block in self.blocks(pieces, windows):
            blocks.append(block)
            if windows is not None and sum(map(len, blocks)) >= windows:
                break
        return torch.cat(blocks)[:windows]

    def padded(self, documents: Iterable[str]) -> tuple[Tensor, Tensor]:
        """One document a window, truncated or padded on the right: ids and mask, both ``(documents, seqlen)``."""
        body = self.seqlen - self.bos
        # The text is cut before: a book is not tokenised whole for its first window.
        rows = [row[:body] for text in documents if (row := self._ids(text[: 32 * body]))]
        token = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((len(rows), body), 0 if token is None else int(token))  # type: ignore[arg-type]
        mask = torch.zeros(len(rows), body, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        return self._begun(ids, self.tokenizer.bos_token_id), self._begun(mask, True)

    def windows(self, ids: Tensor, mask: Tensor | None, source: str) -> TokenWindows:
        """Windows with their word count; ``mask`` is ``None`` where no window is padded."""
        if not len(ids):
            raise DataError(f"{source} is too short for one window of {self.seqlen} tokens: lower seqlen or add text")
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return TokenWindows(ids, keep, source, partial(_count_words, self.tokenizer, ids, mask))

    def _ids(self, text: str) -> list[int]:
        # verbose=False: a corpus is longer than the model's context on purpose, no warning needed
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]

    def _begun(self, rows: Tensor, value: Any) -> Tensor:
        return torch.cat([torch.full_like(rows[:, :1], value), rows], 1) if self.bos else rows


def _count_words(tokenizer: "PreTrainedTokenizerBase", ids: Tensor, mask: Tensor | None) -> int:
    # Packed windows (no mask) end in the middle of a word, so their text is decoded as one.
    rows = [ids.flatten()] if mask is None else [row[real] for row, real in zip(ids, mask, strict=True)]
    return sum(len(str(tokenizer.decode(row.tolist(), skip_special_tokens=True)).split()) for row in rows)


def _chunks(pieces: Iterable[str], chars: int) -> Iterator[str]:
    """The running text again, in parts of ``chars`` or a little more characters."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= chars:
            yield "".join(waiting)
            waiting, size = [], 0
    if size:
        yield "".join(waiting)


def token_windows(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: Split,
    tokens: int,
    seqlen: int,
    seed: int = 0,
    nsamples: int | None = None,
    packed: bool = True,
    bos: bool = False,
) -> TokenWindows:
    """Cuts ``tokens // seqlen`` windows out of a source.

    The source is read up to 16 times the budget, cut into windows that do not overlap, and the windows are drawn by a
    permutation of ``seed``. ``split="evaluation"`` takes the first windows in order instead, which for ``wiki2`` (all
    rows joined by an empty line) is the customary perplexity text.

    Args:
        source: ``embedded``, a name of :data:`come_pl.text.SOURCES`, or a path.
        tokenizer: Tokenizer of the model.
        split: Part of the source.
        tokens: Budget in tokens; not used with ``nsamples``.
        seqlen: Tokens in a window.
        seed: Seed of the draw.
        nsamples: The official toolkits' unit: this many documents (lines of a text file), drawn at random, or the
            first ones of a source that streams; every window that they fill is kept.
        packed: Join documents and cut the text. ``False``: each document (line of a text file) is one window,
            truncated or padded on the right.
        bos: Begin each window with the tokenizer's BOS token, leaving ``seqlen - 1`` tokens of text.

    Raises:
        DataError: Settings that make no window, or a source with too little text for one.
    """
    cutter = Cutter(tokenizer, seqlen, bos)
    wanted = cutter.count(tokens) if nsamples is None else _at_least_one("nsamples", nsamples)
    mask = None
    if nsamples is None and packed:
        ids = _draw(source, cutter, split, wanted, seed)
    else:
        documents = _documents(source, split, wanted, seed)
        if len(documents) < wanted:
            warnings.warn(f"{source} has only {len(documents)} of the {wanted} documents asked for", stacklevel=2)
        if packed:
            return cutter.windows(cutter.packed(["\n\n".join(documents)]), None, source)
        ids, mask = cutter.padded(documents)
        wanted = len(documents)
    windows = cutter.windows(ids, mask, source)
    if len(windows) < wanted:
        warnings.warn(_short(source, len(windows), wanted, seqlen), stacklevel=2)
    return windows


def _draw(source: str, cutter: Cutter, split: Split, wanted: int, seed: int) -> Tensor:
    """At most ``wanted`` windows ``(windows, seqlen)``: drawn by ``seed``, or for evaluation the first ones."""
    if split == "evaluation":
        return cutter.packed(iter_text(source, split), wanted)
    pool = cutter.packed(iter_text(source, split), max(wanted, min(POOL * wanted, POOL_TOKENS // cutter.seqlen)))
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:wanted]]


def _documents(source: str, split: Split, wanted: int, seed: int) -> list[str]:
    """At most ``wanted`` documents that are not empty: drawn by ``seed``, or the first ones (evaluation, streams)."""
    texts = iter_documents(source, split, lines=True)
    if split == "evaluation" or is_streaming(source):
        return list(islice(texts, wanted))
    known = list(texts)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    return [known[index] for index in order[:wanted]]


def _short(source: str, found: int, wanted: int, seqlen: int) -> str:
    return f"{source} gives only {found} of the {wanted} windows of {seqlen} tokens asked for: using {found}"


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise DataError(f"{name} is {value}: expected at least 1")
    return value


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Item ``i`` is window ``i``; an index past the end is a padding window (all of its mask ``False``)."""

    def __init__(self, windows: TokenWindows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``mask``, both ``(seqlen,)``."""
        if index < len(self):
            return {"input_ids": self.windows.input_ids[index], "mask": self.windows.mask[index]}
        return {"input_ids": self.windows.input_ids[0], "mask": torch.zeros_like(self.windows.mask[0])}


class StrideSampler(DistributedSampler[Any]):
    """Rank ``r`` of ``w`` reads windows ``r, r + w, r + 2w, …`` in order; every rank the same number of them.

    What is missing at the end is filled with the index ``len(dataset)``, a padding window, never with a real window
    twice: sums over all ranks are exact. A subclass of ``DistributedSampler`` so that Lightning leaves it alone.

    ``batch_size``, when given, fills each rank's count up to whole batches.
    """

    def __init__(
        self, dataset: "Dataset[Any]", world_size: int = 1, rank: int = 0, batch_size: int | None = None
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self.real = len(dataset)  # type: ignore[arg-type]
        if batch_size is not None:
            self.num_samples = -(-self.num_samples // batch_size) * batch_size
            self.total_size = self.num_samples * world_size

    def __iter__(self) -> Iterator[int]:
        return (min(index, self.real) for index in range(self.rank, self.total_size, self.num_replicas))


class ResumableSampler(DistributedSampler[Any]):
    """A new permutation each epoch, given by ``(seed, epoch)`` alone and dealt to the ranks in turn.

    Global batch ``k`` holds the same windows however many ranks share it. The last round is completed with windows
    from the beginning of the permutation (a rank with nothing but padding would have no loss). ``start`` is the number
    of windows, over all ranks, that the next pass leaves out because an interrupted run has used them.
    """

    def __init__(self, dataset: "Dataset[Any]", world_size: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.real = len(dataset)  # type: ignore[arg-type]
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        # A generator: Lightning asks for the iterator before it sets the epoch, and draws the first item after.
        start, self.start = self.start, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.real, generator=generator)
        left = order[start:] if start < self.real else order  # all used: the checkpoint closed its epoch
        missing = -len(left) % self.num_replicas
        left = torch.cat([left, order.repeat(-(-missing // self.real))[:missing]])
        yield from left[self.rank :: self.num_replicas].tolist()


class StreamingWindows(IterableDataset[dict[str, Tensor]]):
    """Windows of a corpus larger than memory, tokenised as they are read and in the corpus' order.

    Window ``i`` goes to rank ``i % world_size``; each rank gets ``windows // world_size`` of them, and a source that
    ends before begins again. The first ``skip`` windows of the source (those of validation) are not part of it.
    ``start`` is as in :class:`ResumableSampler`.
    """

    def __init__(
        self, source: str, split: Split, cutter: Cutter, windows: int, skip: int = 0, world_size: int = 1, rank: int = 0
    ) -> None:
        self.source, self.split, self.cutter, self.skip = source, split, cutter, skip
        self.world_size, self.rank, self.start = world_size, rank, 0
        self.total = windows // world_size * world_size
        if not self.total:
            raise DataError(f"{windows} windows are too few for {world_size} ranks: raise tokens")

    def __len__(self) -> int:
        return self.total // self.world_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, self.start = self.start if self.start < self.total else 0, 0
        for row in islice(self._rows(), start + (self.rank - start) % self.world_size, self.total, self.world_size):
            yield {"input_ids": row, "mask": torch.ones(self.cutter.seqlen, dtype=torch.bool)}

    def _rows(self) -> Iterator[Tensor]:
        """Windows without end, each ``(seqlen,)``."""
        while True:
            found = 0
            blocks = self.cutter.blocks(iter_text(self.source, self.split), self.total)
            for row in islice((row for block in blocks for row in block), self.skip, None):
                found += 1
                yield row
            if not found:
                raise DataError(f"{self.source}: no window of {self.cutter.seqlen} tokens is left to train on")
            warnings.warn(_short(self.source, found, self.total, self.cutter.seqlen) + " again", stacklevel=2)


class ResumableLoader(DataLoader[Any]):
    """A loader whose state Lightning saves and restores, so that a mid-epoch checkpoint resumes at the next batch.

    Lightning 2.6 does not skip batches by itself: it continues its counters over a loader that starts anew unless the
    loader has ``state_dict`` and ``load_state_dict``. ``consumed`` tells how many windows training has used (not how
    many were fetched: a batch whose step failed is due again).
    """

    consumed: Callable[[], int] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed() if self.consumed else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        place = self.dataset if isinstance(self.dataset, StreamingWindows) else self.sampler
        if isinstance(place, (StreamingWindows, ResumableSampler)):  # `overfit_batches` puts in another sampler
            place.start = state["consumed"]


_NOT_ATTACHED = "the data module has no windows yet: call attach(tokenizer, bos=..., seed=...) first"


class _WindowModule(LightningDataModule):
    """What the data modules share: which rank this is, and loaders of windows in order."""

    batch_size: int
    _attached: tuple[Any, bool, int] | None = None  # what the windows were cut for

    def _world(self) -> tuple[int, int]:
        """World size and rank, ``(1, 0)`` without a trainer."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _in_order(self, windows: TokenWindows | None) -> DataLoader[Any]:
        if windows is None:
            raise DataError(_NOT_ATTACHED)
        dataset = WindowDataset(windows)
        return DataLoader(dataset, self.batch_size, sampler=StrideSampler(dataset, *self._world()))


class CalibrationData(_WindowModule):
    """Text that a pruning method measures the model on.

    Args:
        calibration: Text source: `embedded` (needs no network), wiki2, c4, pg19, bookcorpus, alpaca, mmlu, or the path
            of a .txt, .jsonl or .parquet file or of a folder of them.
        tokens: Token budget: tokens // seqlen windows are used.
        seqlen: Tokens in a window.
        nsamples: Use this many documents (lines of a text file) instead of the budget, as the official toolkits do.
        packed: Join documents and cut windows. False: one document a window, truncated or padded.
        batch_size: Windows that go through the model at once, per device.
    """

    def __init__(
        self,
        calibration: str = "embedded",
        tokens: int = 32768,
        seqlen: int = 512,
        nsamples: int | None = None,
        packed: bool = True,
        batch_size: int = 2,
    ) -> None:
        super().__init__()
        self.calibration, self.tokens, self.seqlen = calibration, tokens, seqlen
        self.nsamples, self.packed, self.batch_size = nsamples, packed, _at_least_one("batch_size", batch_size)
        self.windows: TokenWindows | None = None

    def attach(self, tokenizer: "PreTrainedTokenizerBase", *, bos: bool, seed: int) -> TokenWindows:
        """Cuts the windows with the model's tokenizer; a second call with the same arguments returns them."""
        if self.windows is None or self._attached != (tokenizer, bos, seed):
            budget: dict[str, Any] = {"tokens": self.tokens, "seqlen": self.seqlen, "nsamples": self.nsamples}
            self.windows = token_windows(
                self.calibration, tokenizer, split="calibration", seed=seed, packed=self.packed, bos=bos, **budget
            )
            self._attached = (tokenizer, bos, seed)
        return self.windows

    def train_dataloader(self) -> DataLoader[Any]:
        """Each window once, in order."""
        return self._in_order(self.windows)


class DistillationData(_WindowModule):
    """Text that a shallow model is trained on, and held-out windows of the same source to validate it.

    Args:
        source: Text source: `embedded` (needs no network), wiki2, c4, pg19, bookcorpus, alpaca, mmlu, or the path of a
            .txt, .jsonl or .parquet file or of a folder of them.
        tokens: Training tokens in an epoch: tokens // seqlen windows.
        seqlen: Tokens in a window.
        batch_size: Windows in a batch, per device.
        validation_tokens: Tokens set aside for validation, never trained on.
        streaming: Tokenise while training and in the order of the corpus, for text larger than memory.
    """

    def __init__(
        self,
        source: str = "embedded",
        tokens: int = 262144,
        seqlen: int = 512,
        batch_size: int = 4,
        validation_tokens: int = 8192,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.tokens, self.seqlen = source, tokens, seqlen
        self.batch_size, self.streaming = _at_least_one("batch_size", batch_size), streaming
        self.validation_tokens = validation_tokens
        self.windows: TokenWindows | None = None  # stays None when streaming
        self.validation: TokenWindows | None = None

    def attach(self, tokenizer: "PreTrainedTokenizerBase", *, bos: bool, seed: int) -> None:
        """Cuts validation and (unless streaming) training windows; a second call with the same arguments is free."""
        if self._attached == (tokenizer, bos, seed):
            return
        cutter = Cutter(tokenizer, self.seqlen, bos)
        train, held = cutter.count(self.tokens), cutter.count(self.validation_tokens)
        if self.streaming:
            ids = cutter.packed(iter_text(self.source, "distillation"), held)
        else:
            ids = _draw(self.source, cutter, "distillation", held + train, seed)
            if len(ids) < held + train:
                held = min(held, len(ids) // 8 or 1)
                warnings.warn(_short(self.source, len(ids) - held, train, self.seqlen), stacklevel=2)
            self.windows = cutter.windows(ids[held:], None, self.source)
        self.validation = cutter.windows(ids[:held], None, self.source)
        self._attached = (tokenizer, bos, seed)

    def train_dataloader(self) -> "ResumableLoader":
        """Batches of training windows; a run resumed in the middle of an epoch goes on with the next batch."""
        if self._attached is None or self.validation is None:
            raise DataError(_NOT_ATTACHED)
        tokenizer, bos, seed = self._attached
        if self.streaming:
            # The length is exact (the source begins again when it ends), so Lightning's doubt about it is noise.
            warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
            cutter = Cutter(tokenizer, self.seqlen, bos)
            skip, windows = len(self.validation), cutter.count(self.tokens)
            stream = StreamingWindows(self.source, "distillation", cutter, windows, skip, *self._world())
            loader = ResumableLoader(stream, self.batch_size)
        else:
            assert self.windows is not None
            dataset = WindowDataset(self.windows)
            loader = ResumableLoader(dataset, self.batch_size, sampler=ResumableSampler(dataset, *self._world(), seed))
        loader.consumed = self._consumed
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation window once, in order."""
        return self._in_order(self.validation)

    def _consumed(self) -> int:
        """Windows of this epoch, over all ranks, on which a training step has finished."""
        if self.trainer is None:
            return 0
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return batches * self.batch_size * self._world()[0]
