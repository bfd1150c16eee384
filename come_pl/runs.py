"""Run folders: what made them, whether they can be gone on with, and what is said about them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from come_pl import locks
from come_pl.record import versions, write_atomically

RUN_FILE = "run.json"
FRUITS = ("record.jsonl", "checkpoints/*", "model*")  # what a run has from its first finished step on
# all that one may have before
EARLY = {RUN_FILE, "logs", "weights", "checkpoints", "curves.csv", "validation.csv", ".scratch", ".writable"}
# what says most about a difference between two runs, first
TELLING = (
    *("model.path", "student", "teacher", "method.name", "target_layers", "data.source", "data.tokens", "data.seqlen"),
    *("model.dtype", "model.precision", "refit.parts", "seed"),
)


class RunError(ValueError):
    """An output folder that cannot be used; the message is one line that says what to do."""


def digest(identity: Mapping[str, Any]) -> str:
    """Six characters that differ when anything in `identity` does."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:6]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """What nested mappings say, by names with dots."""
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


class Run:
    """A run folder. `info` is what `run.json` holds.

    Within `with run:` a run that fails before its first finished step gives its folder free, and puts the run back that
    it was to replace. No other command gets the folder until then, or until this is forgotten.

    Args:
        folder: made if it is not there.
        identity: everything that decides the result; a folder is gone on with only if its own is the same.
        overwrite: begin anew; the run in the folder is set aside until this one has finished a step (`settle`).
        main: whether this process writes.
        reads: (option, path) of all that the run reads; none of it may be in the folder. Names that are no path pass.

    Raises:
        RunError: the folder holds something else or what is to be read, cannot be written, or is being written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        overwrite: bool = False,
        main: bool = True,
        reads: Iterable[tuple[str, str]] = (),
    ):
        self.folder, self.main = folder, main
        self._place = folder.resolve()  # the folder may be a link, as `latest` is
        self._aside = self._place.with_name(f".{self._place.name}.replaced")
        identity = json.loads(json.dumps(identity, default=str))  # as it will be read back
        for option, path in reads:
            self._keep_apart(option, path)
        anew = overwrite and not main  # such a process may come before the old run is set aside
        self._claim = _Claim()
        self._take()
        try:
            self.settle()  # what a kill left
            if main and overwrite and (folder / RUN_FILE).is_file():
                self._place.rename(self._aside)
            if not anew:
                self._check(identity)
            self._take()  # it may be another folder now
        except (OSError, RunError) as error:
            with contextlib.suppress(OSError):
                self.settle()
            self._claim.free()
            if isinstance(error, OSError):
                raise self._unwritable(error) from None
            raise
        self.resumed = not anew and (folder / RUN_FILE).is_file()
        self.info: dict[str, Any] = {"status": "running", "identity": identity}
        if self.resumed:
            self.info = read_run(folder)
            self.info["status"] = "finished" if self.finished else "running"
        else:
            self.update(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), versions=versions())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(OSError):  # what the run itself failed by is what to tell; the next start settles
            if isinstance(error, Exception) and not _fruitful(self._place):
                self.update(status="failed")
            self.settle()
        self._claim.free()

    def settle(self) -> None:
        """Keep one of the run and the one that it is to replace: the new one if it has finished a step, or the old."""
        if not self.main or not self._aside.is_dir():
            return
        if not _fruitful(self._place) and (self._aside / RUN_FILE).is_file():
            if self._place.exists():
                shutil.rmtree(self._place)
            self._aside.rename(self._place)
            print(f"{self.folder}: the run that was there is back; the one to replace it had finished no step")
        else:
            (self._aside / RUN_FILE).unlink(missing_ok=True)  # first: what a kill leaves of it is not put back
            shutil.rmtree(self._aside, ignore_errors=True)

    def _take(self) -> None:
        if self.main and not self._claim.take(self._place):
            raise RunError(
                f"output folder {str(self.folder)!r} is being written by another command; wait for it to end, or give "
                "another --output"
            )

    def _keep_apart(self, option: str, path: str) -> None:
        read = Path(path).expanduser()
        there = read.resolve()
        if read.exists() and self._place in (there, *there.parents):
            what = "is what" if self._place == there else f"holds {path!r}, which"
            raise RunError(f"output folder {str(self.folder)!r} {what} {option} reads; give another --output")

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"output folder {str(self.folder)!r} cannot be written ({error.strerror}); give another --output"
        )

    def _check(self, identity: Mapping[str, Any]) -> None:
        folder = self.folder
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            if self.main:
                probe = folder / ".writable"
                probe.write_text("x")
                probe.unlink()
        except OSError as error:
            raise self._unwritable(error) from None
        if (folder / RUN_FILE).is_file():
            theirs, ours = flat(read_run(folder).get("identity", {})), flat(identity)
            different = sorted((k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k)), key=_rank)
            if different and _free(folder):
                if self.main:
                    shutil.rmtree(self._place)
                    self._place.mkdir()
            elif different:
                more = f" and {len(different) - 1} more" if len(different) > 1 else ""
                raise RunError(
                    f"output folder {str(folder)!r} holds another run ({_difference(different[0], theirs, ours)}{more})"
                    "; give another --output, or --overwrite to replace it"
                )
        elif self.main and any(p.name != ".run.json.partial" for p in folder.iterdir()):
            raise RunError(
                f"output folder {str(folder)!r} is not empty and holds no run of come_pl; give another --output"
            )

    @property
    def finished(self) -> bool:
        return bool(self.info.get("status") == "finished")

    def update(self, **entries: Any) -> None:
        """Add to `run.json`."""
        self.info |= entries
        if self.main:
            write_atomically(self.folder / RUN_FILE, json.dumps(self.info, indent=2, default=str) + "\n")
        if self.finished:
            self.settle()

    def close(self, root: Path, scratch: str) -> None:
        """At the end of a finished run: remove what it no longer needs, and make it the latest of those in `root`."""
        shutil.rmtree(self.folder / scratch, ignore_errors=True)
        if self._place.parent == root.resolve():
            self.make_latest()

    def make_latest(self) -> None:
        """Point `latest`, beside the folder, at it, unless that is its own name."""
        link, partial = self._place.with_name("latest"), self._place.with_name(f".latest.{os.getpid()}")
        if link.is_symlink() or not link.exists():
            with contextlib.suppress(OSError):  # a file system without links: the run itself is whole
                partial.unlink(missing_ok=True)
                partial.symlink_to(self._place.name, target_is_directory=True)
                os.replace(partial, link)


class _Claim:
    """On folders, against other commands. The system takes it back however a process ends, and nothing is left of it;
    where a file system knows no locks it does nothing."""

    def __init__(self) -> None:
        self._held: dict[int, weakref.finalize] = {}  # by the folder's number: one that is renamed is the same

    def take(self, folder: Path) -> bool:
        """Whether the folder is not another's; one that is not there is nobody's."""
        if not locks.KNOWN or not folder.is_dir() or folder.stat().st_ino in self._held:
            return True
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            return True
        if not locks.lock(descriptor):
            os.close(descriptor)
            return False
        self._held[os.fstat(descriptor).st_ino] = weakref.finalize(self, os.close, descriptor)
        return True

    def free(self) -> None:
        for close in self._held.values():
            close()
        self._held.clear()


def _fruitful(folder: Path) -> bool:
    """Whether a run has finished a step there."""
    return any(True for name in FRUITS for _ in folder.glob(name))


def _free(folder: Path) -> bool:
    """Whether a run folder holds nothing but the beginning of a run: no step, and no perplexity unless it failed."""
    info = read_run(folder)
    early = all(p.name in EARLY or p.name.endswith(".partial") for p in folder.iterdir())
    begun = "identity" in info and (info.get("status") == "failed" or "perplexity" not in info)
    return early and begun and not _fruitful(folder)


def _rank(key: str) -> tuple[bool, int, str]:
    return key.endswith("fingerprint"), TELLING.index(key) if key in TELLING else len(TELLING), key


def _difference(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    there, here = theirs.get(key), ours.get(key)
    if key.endswith("fingerprint"):  # only where nothing else differs
        return f"{key}, of the text cut into windows, is {str(there)[:8]} there, {str(here)[:8]} here"
    return f"{key} is {there!r} there, {here!r} here"


def followed(folder: Path) -> Path:
    """The folder that a link such as `latest` points to now: another run may have the link before this one ends."""
    if not folder.is_symlink():
        return folder
    place, here = folder.resolve(), Path.cwd()
    return place.relative_to(here) if place.is_relative_to(here) else place


def read_run(folder: Path) -> dict[str, Any]:
    """Raises RunError: no run there, or one whose `run.json` is damaged."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except OSError:
        above = folder.resolve().parent
        hint = f"; the folder above it does: give {str(folder.parent)!r}" if (above / RUN_FILE).is_file() else ""
        raise RunError(f"{str(folder)!r} holds no run of come_pl (no {RUN_FILE}){hint}") from None
    except ValueError:
        raise RunError(f"{str(folder / RUN_FILE)!r} is damaged; remove the folder and run again") from None


def check_space(folder: Path, gib: float) -> None:
    """Raises RunError if the disk of `folder` has less than `gib` GiB free."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < gib:
        raise RunError(
            f"the disk of {str(folder)!r} has {free:.2f} GiB free, {gib:.2f} GiB are needed to save the result; "
            "free space or give another --output"
        )


def check_launcher(strategy: Any) -> None:
    """Raises RunError: processes of this Lightning strategy are copies of this one, whose results stay in them."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise RunError("--trainer.strategy: processes that are forked or spawned give nothing back; expected ddp")


class BadTarget(ValueError):
    """A target depth that the model does not have."""


def target_depth(layers: int, target_layers: int | None, sparsity: float | None) -> int:
    """Depth to prune to.

    Args:
        layers: depth of the dense model.
        target_layers: the depth itself.
        sparsity: fraction of the parameters of the decoder layers to remove; the least number of layers that removes
            at least as much. Without either, 0.3.

    Raises:
        BadTarget: nothing to remove, nothing left, or both given.
    """
    if target_layers is not None and sparsity is not None:
        raise BadTarget("both --target_layers and --sparsity are given; give one")
    if target_layers is None:
        sparsity = 0.3 if sparsity is None else sparsity
        if not 0 < sparsity < 1:
            raise BadTarget(f"sparsity {sparsity}: expected a fraction of the decoder's parameters between 0 and 1")
        remove = next(k for k in range(1, layers + 1) if k / layers >= sparsity - 1e-9)  # equal layers: share is k / n
        if remove >= layers:
            raise BadTarget(f"sparsity {sparsity} would leave none of the {layers} layers; give a smaller one")
        return layers - remove
    if not 1 <= target_layers < layers:
        raise BadTarget(
            f"target_layers {target_layers}: the model has {layers} layers; expected a depth from 1 to {layers - 1}"
        )
    return target_layers
