"""outlier_keep: the tokens whose score is an outlier among those of their segment; how many is known only at run time.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, K] int64 ascending, pads (-1) first; K = the most that any sample of the batch keeps (an unbacked size)
Rule:    outliers score above Q3 + fence * (Q3 - Q1), the quartiles interpolated linearly; a segment without one keeps
         its best token as the only one. With spread > 0 every s-th token joins them, of those in front of the last,
         s = max(1, tokens // outliers // spread).
Budget:  no more than `count` tokens of each segment where count > 0, else than a share of its tokens (portions.py); of
         more the best-scored stay, so that outliers go last.
Ties:    the lower index wins.   NaN: counts as 0.

Reference: LLaVA-PruMerge, arXiv 2403.15388 (adaptive number of outliers; PruMerge+ with spread 3). Deviation: the
outliers of each image make its own number, where the published code takes one share over the whole batch; without an
outlier the published code keeps none, or divides by zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.op import Scope, Select, op, primitive
from tvc.kernels.segments import budgets, pack, per_token, ranks
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 1, 1, 1], [0] * 10, [-1, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[5, 3], [10, 0], [1, 8]])
    score = torch.randn(3, 10).exp()
    score[1, 3] = score[1, 8] = score[2, 5] = 40.0
    for spread in (0, 3):
        yield f"all-spread{spread}", (score, segment, counts, 1.5, spread, 1000, 0)
        yield f"half-spread{spread}", (score, segment, counts, 0.0, spread, 500, 0)
        yield f"two-spread{spread}", (score, segment, counts, 0.0, spread, 0, 2)
        yield f"equal-scores-spread{spread}", (torch.full((3, 10), 0.5), segment, counts, 1.5, spread, 1000, 0)
        one = (torch.ones(1, 1), torch.tensor([[0]]), torch.tensor([[1]]))
        yield f"one-token-spread{spread}", (*one, 1.5, spread, 0, 1)
    yield "count-above-all", (score, segment, counts, 0.5, 1, 0, 99)
    tied = torch.tensor([[1.0, 9.0, 9.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0]]).repeat(3, 1)
    yield "tied-scores", (tied, segment, counts, 1.5, 0, 0, 2)
    yield "nan", (score.masked_fill(score < 0.7, float("nan")), segment, counts, 1.5, 3, 1000, 0)
    shuffled = torch.tensor([[1, 0, 1, 0, -1, 1, 0]])
    yield "interleaved", (torch.randn(1, 7).exp(), shuffled, torch.tensor([[3, 3]]), 0.0, 2, 1000, 0)
    whole = torch.zeros(1, 577, dtype=torch.int64)
    yield "V577", (torch.randn(1, 577).exp(), whole, torch.tensor([[577]]), 1.5, 3, 1000, 0)


@op(_cases)
def outlier_keep(
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    fence: float,
    spread: int,
    permille: int,
    count: int,
) -> torch.Tensor:
    """[B, K] int64: the outliers, at least one of each segment; K is the largest number of a sample."""
    valid, score = segment >= 0, score.float()
    score = torch.where(torch.isnan(score), 0.0, score)
    place = ranks(segment, counts, score)
    last = (counts - 1).clamp(min=0)
    # Each segment's scores, descending, one segment after another; one more column takes the pads.
    begin = counts.cumsum(1) - counts
    column = torch.where(valid, per_token(begin, segment) + place, segment.shape[1])
    table = score.new_zeros(score.shape[0], score.shape[1] + 1).scatter(1, column, score)

    def quartile(number: int) -> torch.Tensor:
        below, part = last * number // 4, (last * number % 4).float() / 4
        low = table.gather(1, begin + last - below)
        return low + (table.gather(1, begin + (last - below - 1).clamp(min=0)) - low) * part

    upper = quartile(3)
    outlier = valid & (score > per_token(upper + fence * (upper - quartile(1)), segment))
    # Outliers are the first in descending order, so that their number says which they are.
    number = _number(outlier, segment, counts).clamp(min=1)
    keep = valid & (place < per_token(number, segment))
    if spread > 0:
        step = (counts // number // spread).clamp(min=1)
        order = ranks(segment, counts)
        keep = keep | (valid & (order % per_token(step, segment) == 0) & (order < per_token(last, segment)))
    left = torch.where(keep, segment, -1)
    best = ranks(left, _number(keep, segment, counts), score) < per_token(budgets(counts, permille, count), segment)
    keep = keep & best
    return pack(keep, largest(keep))


def _number(flag: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, N] int64: how many tokens of each segment are flagged."""
    # Column 0 takes the others.
    place = torch.where(flag, segment + 1, 0)
    numbers = counts.new_zeros(counts.shape[0], counts.shape[1] + 1)
    return numbers.scatter_add(1, place, torch.ones_like(place))[:, 1:]


@primitive
class Outliers(Select):
    """Tokens that score unusually high stay, however many they are."""

    key: ClassVar[str] = "outliers"
    shorthand: ClassVar[str | None] = "keep"
    exact: ClassVar[bool] = False
    keep: Budget = Field(description="the most that may stay of each scope")
    fence: float = Field(1.5, ge=0, allow_inf_nan=False, description="interquartile ranges above the upper quartile")
    spread: int = Field(0, ge=0, description="evenly spaced tokens for each outlier beside it, about; 0: none")

    def apply(self, score: torch.Tensor | None, scope: Scope) -> torch.Tensor:
        rule = (self.fence, self.spread, *self.keep.numbers)
        return outlier_keep.overload(score, scope.segment, scope.counts, *rule)

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound: how many are outliers is known only at run time, a quarter at most."""
        return [min(self.keep.kept(n), n if self.spread else max(1, (n + 2) // 4)) for n in counts]
