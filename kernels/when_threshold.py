"""score_gate: whether a statistic of a sample's scores lies beyond a threshold.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads) -> [B] bool
Rule:    max, mean or sum of the valid scores, in float32, strictly above (or below) the threshold.
Edges:   NaN scores take no part; a sample without a valid score gives False (nothing would leave).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from tvc.kernels.op import Scope, When, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0], [0, 0, 1, 1], [-1, -1, -1, -1]])
    score = torch.randn(3, 4)
    for reduce in ("max", "mean", "sum"):
        for above in (True, False):
            name = f"{reduce}-{'above' if above else 'below'}"
            yield name, (score, segment, reduce, 0.125, above)
            yield f"{name}-nan", (score.masked_fill(score > 0, float("nan")), segment, reduce, -0.5, above)
            yield f"{name}-equal", (torch.full((2, 4), 0.5), segment[1:], reduce, 0.5, above)


@op(_cases)
def score_gate(score: torch.Tensor, segment: torch.Tensor, reduce: str, threshold: float, above: bool) -> torch.Tensor:
    """[B] bool: the statistic passes the threshold."""
    score = score.float()
    counted = (segment >= 0) & ~torch.isnan(score)
    number = counted.sum(1)
    if reduce == "max":
        # One more column keeps the maximum defined for V = 0.
        filler = torch.full((score.shape[0], 1), float("-inf"), device=score.device)
        value = torch.cat([filler, torch.where(counted, score, float("-inf"))], dim=1).amax(1)
    else:
        value = torch.where(counted, score, 0.0).sum(1)
        if reduce == "mean":
            value = value / number.clamp(min=1)
    return (number > 0) & (value > threshold if above else value < threshold)


@primitive
class ThresholdGate(When):
    """The visual tokens of a sample leave when a statistic of their scores lies beyond a threshold."""

    key: ClassVar[str] = "threshold"
    reduce: Literal["max", "mean", "sum"] = "max"
    above: float | None = Field(None, allow_inf_nan=False)
    below: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_side(self) -> ThresholdGate:
        if (self.above is None) == (self.below is None):
            raise ValueError("give either `above` or `below`")
        return self

    def apply(self, score: torch.Tensor | None, scope: Scope) -> torch.Tensor:
        threshold = self.above if self.above is not None else self.below
        return score_gate.overload(score, scope.segment, self.reduce, threshold, self.above is not None)
