"""exit_logits: what a trained router says of a sample: stay (first logit) or leave (second).

Shapes:  states [B, 2, D] float (see text_states), hidden_weight [h, 2 D], route_weight [2, h] -> [B, 2] float32
Rule:    route_weight . gelu(hidden_weight . [mean of the text; last text token]) in float32, no biases.

Reference: DyVTE, arXiv 2411.19628; code DoubtedSteam/DyVTE@b4a3396 (read, not copied).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.kernels.op import Scope, Tap, When, op, primitive
from tvc.kernels.text_states import text_states
from tvc.kernels.weights import Shape, Trained


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, width, hidden in ((1, 4, 3), (3, 6, 8)):
        yield (
            f"B{batch}-D{width}",
            (torch.randn(batch, 2, width), torch.randn(hidden, 2 * width), torch.randn(2, hidden)),
        )
    yield "zeros", (torch.zeros(2, 2, 4), torch.randn(3, 8), torch.randn(2, 3))


@op(_cases)
def exit_logits(states: torch.Tensor, hidden_weight: torch.Tensor, route_weight: torch.Tensor) -> torch.Tensor:
    """[B, 2] float32: for staying, for leaving."""
    hidden = torch.nn.functional.gelu(states.float().flatten(1) @ hidden_weight.float().T)
    return hidden @ route_weight.float().T


@primitive
class Router(Trained, When):
    """The visual tokens of a sample leave when a trained router, which looks at the text behind the image, says so.

    A sample without visual tokens stays as it is.
    """

    key: ClassVar[str] = "router"
    shorthand: ClassVar[str | None] = "weights"

    def taps(self) -> dict[str, Tap]:
        return {"text": Tap("text", of=("behind",)), **self.module()}

    def shapes(self, width: int | str) -> dict[str, Shape]:
        twice = 2 * width if isinstance(width, int) else f"2 {width}"
        return {"hidden.weight": ("hidden", twice), "route.weight": (2, "hidden")}

    def apply(
        self,
        score: torch.Tensor | None,
        scope: Scope,
        text: tuple[torch.Tensor, torch.Tensor],
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """[B] bool."""
        states = text_states.overload(*text)
        logits = exit_logits.overload(states, weights["hidden.weight"], weights["route.weight"])
        return ((scope.segment >= 0).sum(1) > 0) & (logits[:, 1] > logits[:, 0])
