"""The selector `afford`: as many of the best-scored tokens as bring the mean over the decoder's layers to a share."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.allowance import allowance, spent_tap
from tvc.kernels.merge_scenes import Share
from tvc.kernels.op import Scope, Select, Tap, primitive
from tvc.kernels.select_predicted import numbered_keep


@primitive
class Afford(Select):
    """The best-scored tokens stay, as many as make the mean over all layers a share of what entered the first."""

    key: ClassVar[str] = "afford"
    shorthand: ClassVar[str | None] = "cost"
    exact: ClassVar[bool] = False
    components: ClassVar[tuple[str, ...]] = ("language",)
    cost: Share = Field(description="visual tokens of a layer on average: a share of those that enter the decoder")
    depth: int | None = Field(None, gt=0, description="layers of the decoder; default: those of the model")
    before: int | None = Field(None, ge=0, description="the layer that the step stands before; default: as it does")

    def taps(self) -> dict[str, Tap]:
        return spent_tap(self.before)

    def apply(self, score: torch.Tensor | None, scope: Scope, spent: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        room = allowance(scope, spent, self.cost.permille or 0, self.depth, self.before)
        return numbered_keep.overload(score, scope.segment, scope.counts, room)

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound: what the layers in front have held is known only at run time."""
        return list(counts)
