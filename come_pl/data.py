"""Token windows → Lightning data modules, with samplers that lose and repeat nothing."""

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from come_pl.text import DataError, Split, iter_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from come_pl.windows import Cutter, TokenWindows, at_least_one, draw, short, token_windows

__all__ = ["TokenWindows", "token_windows", "CalibrationData", "DistillationData"]


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
    of windows, over all ranks, that the next pass leaves out because an interrupted run has used them. After ``period``
    epochs, if it is given, the permutations come again.
    """

    def __init__(self, dataset: "Dataset[Any]", world_size: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.real = len(dataset)  # type: ignore[arg-type]
        self.start = 0
        self.period: int | None = None

    def __iter__(self) -> Iterator[int]:
        # A generator: Lightning asks for the iterator before it sets the epoch, and draws the first item after.
        start, self.start = self.start, 0
        epoch = self.epoch % self.period if self.period else self.epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
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
            warnings.warn(short(self.source, found, self.total, self.cutter.seqlen) + " again", stacklevel=2)


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
        tokens: int = 16384,
        seqlen: int = 512,
        nsamples: int | None = None,
        packed: bool = True,
        batch_size: int = 2,
    ) -> None:
        super().__init__()
        self.calibration, self.tokens, self.seqlen = calibration, tokens, seqlen
        self.nsamples, self.packed, self.batch_size = nsamples, packed, at_least_one("batch_size", batch_size)
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
        tokens: int = 196608,
        seqlen: int = 512,
        batch_size: int = 4,
        validation_tokens: int = 8192,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.tokens, self.seqlen = source, tokens, seqlen
        self.batch_size, self.streaming = at_least_one("batch_size", batch_size), streaming
        self.validation_tokens = validation_tokens
        self.windows: TokenWindows | None = None  # stays None when streaming
        self.validation: TokenWindows | None = None

    def attach(self, tokenizer: "PreTrainedTokenizerBase", *, bos: bool, seed: int) -> None:
        """Cuts validation and (unless streaming) training windows; a second call with the same arguments is free."""
        if self._attached == (tokenizer, bos, seed):
            return
        cutter = Cutter(tokenizer, self.seqlen, bos)
        train = cutter.count(self.tokens)
        if self.validation_tokens < self.seqlen:
            raise DataError(
                f"validation_tokens {self.validation_tokens}: expected at least one window of seqlen {self.seqlen}; "
                "raise validation_tokens"
            )
        held = cutter.count(self.validation_tokens)
        if self.streaming:
            ids = cutter.packed(iter_text(self.source, "distillation"), held)
        else:
            ids = draw(self.source, cutter, "distillation", held + train, seed)
            if len(ids) < held + train:
                asked, held = held, min(held, max(len(ids) - train, len(ids) // 8, 1))
                if len(ids) - held < train:
                    warnings.warn(short(self.source, len(ids) - held, train, self.seqlen), stacklevel=2)
                if held < asked:
                    warnings.warn(short(f"{self.source}, for validation,", held, asked, self.seqlen), stacklevel=2)
            self.windows = cutter.windows(ids[held : held + train], None, self.source)
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

    def batches(self, limit: int | float) -> int:
        """Training batches of an epoch on each rank, under Lightning's ``limit_train_batches``."""
        found = len(self.train_dataloader())
        return min(found, limit) if isinstance(limit, int) else int(found * limit)

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation window once, in order."""
        return self._in_order(self.validation)

    def _consumed(self) -> int:
        """Windows of this epoch, over all ranks, on which a training step has finished; 0 once it is over."""
        if self.trainer is None:
            return 0
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        over = batches >= self.trainer.num_training_batches  # as many as `limit_train_batches` leaves
        return 0 if over else batches * self.batch_size * self._world()[0]
