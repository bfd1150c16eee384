"""What is measured: a run folder or a checkpoint, the dense model beside it, and where the result goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from come_pl import models
from come_pl.decoder import Decoder
from come_pl.runs import RUN_FILE, RunError, digest, followed, read_run


@dataclass
class Subject:
    """A model to be measured, loaded when asked for.

    Attributes:
        path: as `models.locate` takes it.
        run: its run folder, if it is one.
    """

    path: str
    run: Path | None = None

    @property
    def dense(self) -> str:
        """Path of the dense model that a run began with. Raises RunError: not a run."""
        path = read_run(self.run).get("model", {}).get("path") if self.run else None
        if not path:
            raise RunError(f"{self.path!r} is no run folder that says what it was made from; give --dense PATH")
        return str(path)

    def output(self, root: Path, name: str) -> Path:
        """`RUN/name.json` for a run folder, else `root/MODEL-name.json`."""
        if self.run:
            return self.run / f"{name}.json"
        stem = Path(self.path).name.removesuffix(".gguf").replace(":", "-") or "model"
        return root / f"{stem}-{digest({'path': self.path})}-{name}.json"

    def load(self, dtype: str, device: torch.device) -> Any:
        return models.load_model(self.path, dtype, accelerated=device.type != "cpu").to(device)


def read_subject(path: str) -> Subject:
    """Raises RunError: a run folder without a model. ModelError: nothing that can be loaded."""
    folder = Path(path).expanduser()
    run = followed(folder) if (folder / RUN_FILE).is_file() else None
    if run and run != folder:
        folder, path = run, str(run)
    if run and not (folder / "model" / "config.json").is_file():
        removed = read_run(folder).get("model_removed")
        state = f"removed {removed}" if removed else "let its run finish first"
        raise RunError(f"run folder {path!r} has no model/ ({state})")
    models.load_config(path)
    return Subject(path, run)


def read_pair(path: str, dense: str | None) -> tuple[Subject, Subject | None]:
    """A subject and its dense model; `auto` is the one that the run began with."""
    subject = read_subject(path)
    if dense == "auto":
        dense = subject.dense
    return subject, read_subject(dense) if dense else None


def load_pair(subject: Subject, dense: Subject | None, dtype: str, device: torch.device) -> dict[str, Any]:
    """`model` and, if there is one, `dense`, both in the dtype that the dense one has or is given."""
    if dense is None:
        return {"model": subject.load(dtype, device)}
    beside = dense.load(dtype, device)
    return {"model": subject.load(str(beside.dtype).removeprefix("torch."), device), "dense": beside}


def check_output(file: Path) -> None:
    """Raises RunError: no result can be written there, as JSON with Markdown beside it."""
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if file.suffix.lower() == ".md":
        why = "the Markdown goes beside the JSON"
    elif file.is_dir():
        why = "it is a folder"
    elif not above.is_dir() or not os.access(above, os.W_OK):
        why = f"{str(above)!r} is no folder that can be written"
    else:
        return
    raise RunError(f"output {str(file)!r} cannot be written ({why}); give --output a FILE.json")


def device_of(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises RunError: a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); expected auto, cpu or cuda"
        ) from None
    return device


def described(path: str, model: Any) -> dict[str, Any]:
    """What tells a model from another, for a result file."""
    decoder = Decoder(model)
    return {
        "path": path,
        "fingerprint": models.fingerprint(model),
        "layers": len(decoder),
        "parameters": models.parameter_count(model),
        "layer_parameters": decoder.layer_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
