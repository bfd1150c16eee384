"""What a layer's output projections get, kept while the layer is repaired: its attention, and its MLP, need not run
again where only what comes after them has changed. What comes out is the same, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, nn

from come_pl.decoder import Decoder


class _Known(nn.Module):
    """Stands for a block whose output projection's input is known.

    Args:
        name: of the projection inside the block.
        pair: whether the layer expects attention's weights beside the output.
    """

    def __init__(self, name: str, projection: nn.Module, x: Tensor, pair: bool):
        super().__init__()
        self.add_module(name, projection)
        self.name, self.x, self.pair = name, x, pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.get_submodule(self.name)(self.x)
        return (found, None) if self.pair else found


class KnownInputs:
    """Of one student layer, for each batch: the inputs of its attention's and its MLP's output projection, as far as
    they are those that a forward would give them. In memory, where the streams are.

    Args:
        enabled: asked as a layer begins; where it says no, nothing is kept.
    """

    def __init__(self, enabled: Callable[[], bool] = lambda: True):
        self.enabled = enabled
        self.layer: int | None = None
        self._found: dict[tuple[int, str], Tensor] = {}

    def begin(self, layer: int | None) -> None:
        """Nothing is known any more; what runs of this layer will be kept."""
        self.layer = layer if self.enabled() else None
        self._found.clear()

    def changed(self, decoder: Decoder, paths: Collection[str]) -> None:
        """Projections of the layer have other weights."""
        family, others = decoder.family, set(paths) - {decoder.family.mlp_output}
        if others:
            after = others <= {family.attention_output, *family.mlp_inputs}  # which attention does not read
            kept = family.attention_output if after else None
            self._found = {key: x for key, x in self._found.items() if key[1] == kept}

    @contextlib.contextmanager
    def used(self, decoder: Decoder, layer: int | None, batch: int, path: str = "") -> Iterator[None]:
        """Within it layer `layer` of the student runs on a batch's stream with what is known, and more is then.

        Args:
            path: a projection that the forward goes to, if it is not an output projection.
        """
        if layer is None or layer != self.layer:
            yield
            return
        module, family = decoder.layers[layer], decoder.family
        with contextlib.ExitStack() as undone:
            for output in (family.attention_output, family.mlp_output):
                block, _, name = output.rpartition(".")
                projection, known = decoder.part(module, output), self._found.get((batch, output))
                if known is None:
                    undone.callback(projection.register_forward_pre_hook(self._keeping(batch, output)).remove)
                elif block and not path.startswith(f"{block}."):  # OPT's MLP has no module of its own
                    stand_in = _Known(name, projection, known, output == family.attention_output)
                    undone.callback(setattr, module, block, module.get_submodule(block))
                    setattr(module, block, stand_in)
            yield

    def _keeping(self, batch: int, path: str) -> Any:
        def before(module: nn.Module, args: tuple[Tensor]) -> None:
            self._found[batch, path] = args[0].detach()

        return before
