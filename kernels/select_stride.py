"""stride_keep: evenly spaced tokens of each segment.

Shapes:  segment [B, V] int64 (-1 pads), counts [B, N] int64 -> [B, slots] int64 ascending, pads (-1) first
Rule:    of n tokens, k stay: those at floor((2 i + 1) n / (2 k)), i = 0..k-1, the middles of k equal stretches.
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py).
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
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    yield "share-half", (segment, counts, 500, 0, 3)
    yield "share-all", (segment, counts, 1000, 0, 7)
    yield "count-two", (segment, counts, 0, 2, 4)
    yield "count-above-all", (segment, counts, 0, 9, 18)
    yield "one-token", (torch.tensor([[0]]), torch.tensor([[1]]), 0, 1, 1)
    for count in (1, 5, 64, 288, 575, 576):
        yield f"V576-keep{count}", (torch.zeros(1, 576, dtype=torch.int64), torch.tensor([[576]]), 0, count, count)


@op(_cases)
def stride_keep(segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int) -> torch.Tensor:
    """[B, slots] int64: evenly spaced positions of each segment."""
    place = ranks(segment, counts)
    # Place j is kept where an odd multiple of n lies in [2 k j, 2 k (j + 1)); below x lie ceil(x / n) // 2 of them.
    size = per_token(counts, segment).clamp(min=1)
    edge = 2 * per_token(budgets(counts, permille, count), segment)
    before = (edge * place + size - 1) // size // 2
    after = (edge * (place + 1) + size - 1) // size // 2
    return pack((segment >= 0) & (after > before), slots)


@primitive
class Stride(Select):
    """Evenly spaced tokens of each scope stay; no score is needed."""

    key: ClassVar[str] = "stride"
    shorthand: ClassVar[str | None] = "keep"
    needs_score: ClassVar[bool] = False
    keep: Budget = Field(description="what stays of each scope")

    def apply(self, score: torch.Tensor | None, scope: Scope) -> torch.Tensor:
        budget = self.keep
        slots = budget.slots(scope.segment.shape[1], scope.number)
        return stride_keep.overload(scope.segment, scope.counts, *budget.numbers, slots)

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]
