"""Decoder layers through torch.compile, wherever nothing looks inside of them.

What is compiled is the forward of the layers' class, once for all layers: weights are arguments of the graph. A hook
that comes later is not seen, so a layer with one on a module inside of it (statistics, matrices that are elsewhere)
runs as it is, and so does every layer that gradients are wanted of.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from come_pl.errors import first_line

BACKEND = "inductor"


class CompileError(ValueError):
    """torch.compile cannot: no compiler on this machine, or a layer that it does not take."""


@functools.cache
def _graph(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(forward, backend=backend)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    try:
        return _graph(type(layer).forward, BACKEND)(layer, *args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CompileError(f"torch.compile failed ({first_line(error)}); leave out --model.compile") from error


def _looked_into(layer: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules() if m is not layer)


@contextlib.contextmanager
def compiled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within it the forwards of `layers` are compiled, but for those that something looks into; without effect where
    gradients are recorded.

    Raises:
        CompileError: at the first forward.
    """
    taken = [] if torch.is_grad_enabled() else [layer for layer in set(layers) if not _looked_into(layer)]
    for layer in taken:
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in taken:
            del layer.forward  # the class's own again
