"""Run folders: what made them, whether they can be gone on with, and what is said about them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from come_pl.record import versions, write_atomically

RUN_FILE = "run.json"


class RunError(ValueError):
    """An output folder that cannot be used; the message is one line that says what to do."""


def digest(identity: Mapping[str, Any]) -> str:
    """Six characters that differ when anything in `identity` does."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:6]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


class Run:
    """A run folder. `info` is what `run.json` holds.

    Args:
        folder: made if it is not there.
        identity: everything that decides the result; a folder is gone on with only if its own is the same.
        overwrite: empty the folder first.
        main: whether this process writes.

    Raises:
        RunError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False, main: bool = True):
        self.folder, self.main = folder, main
        identity = json.loads(json.dumps(identity, default=str))  # as it will be read back
        if main and overwrite and (folder / RUN_FILE).is_file():
            shutil.rmtree(folder)
        self._check(identity)
        self.resumed = (folder / RUN_FILE).is_file()
        self.info: dict[str, Any] = read_run(folder) if self.resumed else {"status": "running", "identity": identity}
        if not self.resumed:
            self.update(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), versions=versions())

    def _check(self, identity: Mapping[str, Any]) -> None:
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.main:
                probe = folder / ".writable"
                probe.write_text("x")
                probe.unlink()
        except OSError as error:
            raise RunError(
                f"output folder {str(folder)!r} cannot be written ({error.strerror}); give another --output"
            ) from None
        if (folder / RUN_FILE).is_file():
            theirs, ours = _flat(read_run(folder).get("identity", {})), _flat(identity)
            different = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
            if different:
                key = different[0]
                more = f" and {len(different) - 1} more" if len(different) > 1 else ""
                raise RunError(
                    f"output folder {str(folder)!r} holds another run ({key} is {theirs.get(key)!r} there, "
                    f"{ours.get(key)!r} here{more}); give another --output, or --overwrite to replace it"
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

    def make_latest(self) -> None:
        """Point `latest`, beside the folder, at it."""
        link = self.folder.parent / "latest"
        partial = self.folder.parent / f".latest.{os.getpid()}"
        with contextlib.suppress(OSError):  # a file system without links: the run itself is whole
            partial.unlink(missing_ok=True)
            partial.symlink_to(self.folder.name, target_is_directory=True)
            os.replace(partial, link)


def read_run(folder: Path) -> dict[str, Any]:
    """Raises RunError: no run there, or one whose `run.json` is damaged."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise RunError(f"{str(folder)!r} holds no run of come_pl (no {RUN_FILE})") from None
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
