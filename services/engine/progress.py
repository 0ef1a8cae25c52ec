"""How far a step has got: what whoever watches from another thread can tell a long step from a hang by."""

from __future__ import annotations

from collections.abc import Callable


class StepProgress:
    """Every family's attention passes here, layer by layer. It costs an addition and a comparison.

    On a CPU a sign means that what came before is computed; on a GPU, that it is launched.
    """

    __slots__ = ("num_signs", "on_layer")

    def __init__(self) -> None:
        self.num_signs = 0  # only ever grows
        self.on_layer: Callable[[int], None] | None = None  # told of each layer before its attention

    def enter_layer(self, layer: int) -> None:
        self.num_signs += 1
        if self.on_layer is not None:
            self.on_layer(layer)
