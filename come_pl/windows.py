"""Documents → token windows.

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
from torch import Tensor

from come_pl.decoder import family_of
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


@dataclass
class Cutter:
    """Cuts text into windows of ``seqlen`` tokens, each begun by the BOS token when ``bos``.

    Attributes:
        found: Tokens of the text that was read last.
    """

    tokenizer: "PreTrainedTokenizerBase"
    seqlen: int
    bos: bool = False
    found: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.seqlen < 2:
            raise DataError(f"seqlen is {self.seqlen}: expected at least 2, a token to read and one to predict")
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
        body, self.found = self.seqlen - self.bos, 0
        ids: list[int] = []
        for text in _chunks(pieces, chars):
            new = self._ids(text)
            self.found += len(new)
            ids += new
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
            has = f" (it has {self.found})" if self.found < self.seqlen - self.bos else ""
            raise DataError(
                f"{source} is too short for one window of {self.seqlen} tokens{has}: lower seqlen or add text"
            )
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return TokenWindows(ids, keep, source, partial(_count_words, self.tokenizer, ids, mask))

    def _ids(self, text: str) -> list[int]:
        # verbose=False: a corpus is longer than the model's context on purpose, no warning needed
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]

    def _begun(self, rows: Tensor, value: Any) -> Tensor:
        return torch.cat([torch.full_like(rows[:, :1], value), rows], 1) if self.bos else rows


def check_readable(windows: Iterable[TokenWindows], config: Any, model: str) -> None:
    """Whether a model of this config can read the windows; one warning if they are longer than it was made for.

    Raises:
        DataError: A token that its embeddings have no row for, or more tokens than it has positions.
    """
    config, longest = config.get_text_config(decoder=True), 0
    rows, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
    for found in windows:
        token, longest = int(found.input_ids.max()), max(longest, found.input_ids.shape[1])
        if token >= rows:
            raise DataError(
                f"the tokenizer of {model!r} makes token {token} of {found.source}, and the model's embeddings have "
                f"{rows} rows: expected the tokenizer that the model was trained with"
            )
    if positions is None or longest <= positions:
        return
    if family_of(config).learned_positions:
        raise DataError(f"seqlen is {longest}: {model!r} has positions for {positions} tokens, lower seqlen")
    warnings.warn(f"seqlen {longest} is more than the {positions} tokens that {model!r} was made for", stacklevel=2)


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
    wanted = cutter.count(tokens) if nsamples is None else at_least_one("nsamples", nsamples)
    mask = None
    if nsamples is None and packed:
        ids = draw(source, cutter, split, wanted, seed)
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
        warnings.warn(short(source, len(windows), wanted, seqlen), stacklevel=2)
    return windows


def draw(source: str, cutter: Cutter, split: Split, wanted: int, seed: int) -> Tensor:
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


def short(source: str, found: int, wanted: int, seqlen: int) -> str:
    return f"{source} gives only {found} of the {wanted} windows of {seqlen} tokens asked for: using {found}"


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise DataError(f"{name} is {value}: expected at least 1")
    return value
