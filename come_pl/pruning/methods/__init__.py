"""Pruning methods, one file each, by name."""

from __future__ import annotations

from come_pl.errors import did_you_mean
from come_pl.pruning.methods.base import Method
from come_pl.pruning.methods.come import CoMe
from come_pl.pruning.methods.come_p import CoMeP
from come_pl.pruning.methods.fusegpt import FuseGPT
from come_pl.pruning.methods.laco import LaCo
from come_pl.pruning.methods.magnitude import Magnitude, MagnitudePlus
from come_pl.pruning.methods.mka import MKA
from come_pl.pruning.methods.prune_comp import PruneComp
from come_pl.pruning.methods.replaceme import ReplaceMe
from come_pl.pruning.methods.reverse import Reverse
from come_pl.pruning.methods.shortest_path import ShortestPath
from come_pl.pruning.methods.shortgpt import ShortGPT
from come_pl.pruning.methods.sleb import SLEB
from come_pl.pruning.methods.streamline import Streamline
from come_pl.pruning.methods.taylor import Taylor, TaylorPlus

METHODS: dict[str, type[Method]] = {
    "come": CoMe,
    "come_p": CoMeP,
    "sleb": SLEB,
    "shortgpt": ShortGPT,
    "magnitude": Magnitude,
    "magnitude+": MagnitudePlus,
    "taylor": Taylor,
    "taylor+": TaylorPlus,
    "reverse": Reverse,
    "prune_comp": PruneComp,
    "shortest_path": ShortestPath,
    "mka": MKA,
    "laco": LaCo,
    "replaceme": ReplaceMe,
    "streamline": Streamline,
    "fusegpt": FuseGPT,
}
DEFAULT = "shortest_path"  # where no method is given: what measured best (README), with these settings
DEFAULT_SETTINGS = {"refit.parts": "best"}
ALIASES = {"concat_merge": "come", "concat_merge_P": "come_p"}


class UnknownMethod(ValueError):
    """No method of that name."""


def find(name: str) -> tuple[str, type[Method]]:
    """(canonical name, class) of a method. Raises UnknownMethod, listing those known."""
    canonical = ALIASES.get(name, name)
    if canonical not in METHODS:
        known = [*METHODS, *ALIASES]
        raise UnknownMethod(f"method {name!r} is not known; known: {', '.join(known)}{did_you_mean(name, known)}")
    return canonical, METHODS[canonical]
