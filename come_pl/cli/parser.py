"""The parser of every command: errors in one line, short names in `--config` files, help with the trainer's options
last."""

from __future__ import annotations

import difflib
import re
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from come_pl.cli.common import read_config

ORDER = ("method", "distill", "refit", "model", "data", "evaluation", "trainer")  # of groups in the help
WORDS: dict[Any, tuple[str, str]] = {  # one, many
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}


class Parser(LightningArgumentParser):
    """Lightning's parser, as this package's commands want it.

    Args:
        aliases: short names of options, which a `--config` file may use too (`method: come`).
    """

    def __init__(self, *args: Any, aliases: Mapping[str, str] | None = None, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"exit_on_error": False}))
        self.aliases = aliases or {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        told = isinstance(ex, ArgumentError)  # by this method, on the way out
        raise ArgumentError(None, message if told else self._plain(" ".join(message.split()))) from ex

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:  # a `--config` file
        content = read_config(str(path))
        if not any(f"--{key}" in self.aliases and not isinstance(value, dict) for key, value in content.items()):
            return super().parse_path(path, *args, **kwargs)
        import yaml

        return self.parse_string(yaml.safe_dump(nested(content, self.aliases)), *args, **kwargs)

    def format_help(self, *args: Any) -> str:
        for action in self._actions:
            # Lightning's, beside --seed; and files for a group, where the name is short for an option of it
            if action.dest == "seed_everything" or self.aliases.keys() & set(action.option_strings):
                action.help = SUPPRESS
        self._action_groups = sorted(self._action_groups, key=_rank)
        return super().format_help(*args)

    def _plain(self, message: str) -> str:
        """An error of jsonargparse as: option and value, what was expected."""
        of_key = re.match(r'Parser key "([\w.]+)":', message)
        if of_key is not None:
            hints = {a.dest: getattr(a, "_typehint", None) or a.type for a in self._actions}
            parts = re.split(r"G(?:iven|ot) value: ", message)
            if hints.get(of_key[1]) is not None and len(parts) > 1:
                value = parts[-1].strip("[]").replace("'", "") if parts[-1].startswith("[") else parts[-1]
                return f"--{of_key[1]} {value}: expected {expected(hints[of_key[1]])}"
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)|Option '([^']+)' is not accepted$", message)
        if unknown is not None:
            return message + self._instead(unknown[1] or f"--{unknown[2]}")
        return message

    def _instead(self, name: str) -> str:
        """The option that was meant, as far as can be told."""
        options = [o for a in self._actions if a.help != SUPPRESS for o in a.option_strings if o.startswith("--")]
        options += self.aliases
        last = [option for option in options if option.rpartition(".")[2] == name.lstrip("-")]
        close = last[:1] or difflib.get_close_matches(name, options, 1)
        return f"; did you mean {close[0]}?" if close else "; --help lists the options"


def nested(content: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """A `--config` file's content with official names in the place of short ones: `method: come` as `method: {name:
    come}`."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        name = key if isinstance(value, dict) else aliases.get(f"--{key}", key).removeprefix("--")
        at = result
        *groups, last = name.split(".")
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = {**at[last], **value} if isinstance(value, dict) and isinstance(at.get(last), dict) else value
    return result


def expected(hint: Any, many: bool = False) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        choices = list(dict.fromkeys(map(str, inner)))
        return "one of " * (len(choices) > 1) + ", ".join(choices)
    if origin in (Union, UnionType):
        literals = tuple(value for one in inner if get_origin(one) is Literal for value in get_args(one))
        found = [expected(one, many) for one in inner if one is not NoneType and get_origin(one) is not Literal]
        return " or ".join([*found, *([expected(Literal[literals])] if literals else [])])
    if origin in (list, tuple, set):
        return f"a list of {expected(inner[0], many=True)}" if inner else "a list"
    if hint in WORDS:
        return WORDS[hint][many]
    return "a mapping" if origin is dict or hint is dict else getattr(hint, "__name__", str(hint))


def _rank(group: Any) -> int:
    names = {action.dest.partition(".")[0] for action in group._group_actions if "." in action.dest}
    ranks = [ORDER.index(name) for name in names if name in ORDER]
    own = group.title in ("options", "optional arguments", "positional arguments")
    return -1 if own or not ranks else max(ranks)
