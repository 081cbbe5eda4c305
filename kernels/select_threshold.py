"""threshold_keep: the tokens whose score passes a threshold; how many is known only at run time.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, K] int64 ascending, pads (-1) first; K = the most that any sample of the batch keeps (an unbacked size)
Rule:    score > threshold; or, relative, score >= threshold * (the segment's highest score). A highest score below
         zero is multiplied by 2 - threshold instead, so that the best token always passes a share of at most 1.
NaN:     never passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator

from tvc.kernels.op import Scope, Select, op, primitive
from tvc.kernels.segments import pack, per_token


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    score = torch.randn(3, 7)
    yield "above", (score, segment, counts, 0.0, False)
    yield "above-all", (score, segment, counts, 1e6, False)
    yield "above-none", (score, segment, counts, -1e6, False)
    yield "relative", (score, segment, counts, 0.25, True)
    yield "relative-negative", (score - 9.0, segment, counts, 0.875, True)
    yield "relative-best", (score, segment, counts, 1.0, True)
    yield "equal-scores", (torch.full((3, 7), 0.5), segment, counts, 0.5, True)
    yield "nan", (score.masked_fill(score > 0.5, float("nan")), segment, counts, 0.25, True)
    yield "one-token", (torch.ones(1, 1), torch.tensor([[0]]), torch.tensor([[1]]), 0.5, False)


@op(_cases)
def threshold_keep(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, threshold: float, relative: bool
) -> torch.Tensor:
    """[B, K] int64: the tokens that pass; K is the largest number of a sample."""
    score, valid = score.float(), segment >= 0
    known = valid & ~torch.isnan(score)
    if relative:
        lowest = torch.full((counts.shape[0], counts.shape[1] + 1), float("-inf"), device=score.device)
        # Column 0 takes the pads.
        place = torch.where(known, segment + 1, 0)
        best = lowest.scatter_reduce(1, place, torch.where(known, score, float("-inf")), "amax")[:, 1:]
        keep = known & (score >= per_token(best * torch.where(best < 0, 2.0 - threshold, threshold), segment))
    else:
        keep = known & (score > threshold)
    return pack(keep, largest(keep))


def largest(keep: torch.Tensor) -> int:
    """The most that any sample keeps, read from the tensor: a size that tracing cannot know."""
    # Not int(...): that would ask the tracer for a number.
    slots: int = keep.sum(1).max().item()  # type: ignore[assignment]
    torch._check(slots >= 0)
    torch._check(slots <= keep.shape[1])
    return slots


@primitive
class Threshold(Select):
    """Tokens that score high enough stay, however many they are."""

    key: ClassVar[str] = "threshold"
    exact: ClassVar[bool] = False
    above: float | None = Field(None, allow_inf_nan=False, description="the score that must be exceeded")
    relative: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="the share of the scope's highest score that must be reached"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Threshold:
        if (self.above is None) == (self.relative is None):
            raise ValueError("give either `above` or `relative`")
        return self

    def apply(self, score: torch.Tensor | None, scope: Scope) -> torch.Tensor:
        threshold = self.above if self.above is not None else self.relative
        return threshold_keep.overload(score, scope.segment, scope.counts, threshold, self.relative is not None)

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound, all of them: how many pass is known only at run time."""
        return list(counts)
