"""top_keep: the best-scored tokens of each segment, in their original order.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py).
Ties:    the lower index wins. NaN counts as -inf.
Slots:   at least what any sample keeps; a sample that keeps less is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.op import Scope, Select, op, primitive
from tvc.kernels.segments import budgets, pack, per_token, ranks


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    score = torch.randn(3, 7)
    yield "share-half", (score, segment, counts, 500, 0, 3)
    yield "share-all", (score, segment, counts, 1000, 0, 7)
    for name, numbers in (("sixth", (1, -18)), ("nearest", (1, -19)), ("up", (1, -20)), ("half-nearest", (500, -3001))):
        yield f"share-{name}", (score, segment, counts, *numbers, 6)
    yield "count-two", (score, segment, counts, 0, 2, 4)
    yield "count-above-all", (score, segment, counts, 0, 9, 18)
    yield "equal-scores", (torch.zeros(3, 7), segment, counts, 500, 0, 3)
    yield "tied-scores", (torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 1.0]]).repeat(3, 1), segment, counts, 0, 2, 4)
    yield "interleaved", (torch.randn(1, 6), torch.tensor([[1, 0, 1, 0, -1, 1]]), torch.tensor([[2, 3]]), 0, 1, 2)
    poisoned = score.masked_fill(torch.rand(3, 7) > 0.6, float("nan"))
    yield "nan", (poisoned, segment, counts, 500, 0, 3)
    yield "one-token", (torch.randn(1, 1), torch.tensor([[0]]), torch.tensor([[1]]), 0, 1, 1)
    whole = torch.zeros(1, 577, dtype=torch.int64)
    yield "V577", (torch.randn(1, 577), whole, torch.tensor([[577]]), 111, 0, 64)


@op(_cases)
def top_keep(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int
) -> torch.Tensor:
    """[B, slots] int64: the best of each segment."""
    place = ranks(segment, counts, score.float())
    keep = (segment >= 0) & (place < per_token(budgets(counts, permille, count), segment))
    return pack(keep, slots)


@primitive
class Top(Select):
    """The best-scored tokens of each scope stay."""

    key: ClassVar[str] = "top"
    shorthand: ClassVar[str | None] = "keep"
    keep: Budget = Field(description="what stays of each scope")

    def apply(self, score: torch.Tensor | None, scope: Scope) -> torch.Tensor:
        budget = self.keep
        slots = budget.slots(scope.segment.shape[1], scope.number)
        return top_keep.overload(score, scope.segment, scope.counts, *budget.numbers, slots)

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]
