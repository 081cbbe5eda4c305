"""max_sum_keep: tokens of each segment that are unlike all those taken before, in sum.

Shapes:  feature [B, V, D] float, score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Rule:    first the best-scored token; then again and again the free token whose cosines with those taken have the lowest
         sum, in float32. A token without a direction (zeros, NaN) has cosine 0 with all; NaN scores rank last.
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py).
Ties:    the lower index wins, within 1e-6 of the best value; a token is never taken twice.
Memory:  O(B V D), never V x V.

Reference: ToDRE, arXiv 2505.18757v2, stage 1 (max-sum dispersion); no published code to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.kernels.greedy import Greedy, directions, of_slots, take, to_picked
from tvc.kernels.loop import State
from tvc.kernels.op import Scope, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    feature, score = torch.randn(3, 7, 8), torch.randn(3, 7)
    yield "share-half", (feature, score, segment, counts, 500, 0, 3)
    yield "share-all", (feature, score, segment, counts, 1000, 0, 7)
    yield "count-two", (feature, score, segment, counts, 0, 2, 4)
    yield "count-above-all", (feature, score, segment, counts, 0, 9, 18)
    yield "keep-one", (feature, score, segment, counts, 0, 1, 2)
    yield "all-equal", (torch.ones(3, 7, 8), torch.zeros(3, 7), segment, counts, 500, 0, 3)
    yield "tied", (torch.randint(0, 2, (3, 7, 4)) * 2.0 - 1.0, torch.zeros(3, 7), segment, counts, 0, 2, 4)
    poisoned = score.masked_fill(torch.rand(3, 7) > 0.6, float("nan"))
    yield "nan", (feature, poisoned, segment, counts, 0, 2, 4)
    nothing = (feature[:, :0], score[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64))
    yield "nothing", (*nothing, 250, 0, 0)
    yield "one-token", (torch.randn(1, 1, 4), torch.ones(1, 1), torch.tensor([[0]]), torch.tensor([[1]]), 0, 1, 1)


def _fake(
    feature: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    return of_slots(segment, slots)


@op(_cases, fake=_fake)
def max_sum_keep(
    feature: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that are unlike those taken before."""
    unit = directions(feature)
    lowest = torch.finfo(torch.float32).min
    first = torch.nan_to_num(score.float(), lowest)

    def value(number: torch.Tensor, alike: torch.Tensor) -> torch.Tensor:
        return torch.where(number == 0, first, -alike)

    def after(number: torch.Tensor, picked: torch.Tensor, alike: torch.Tensor) -> State:
        return (alike + to_picked(unit, picked, segment),)

    alike = torch.zeros(segment.shape, device=segment.device)
    return take(value, after, (alike,), segment, counts, permille, count, slots, unit=1.0)


@primitive
class MaxSum(Greedy):
    """The best-scored token stays, and then those least like all that stay already (max-sum dispersion)."""

    key: ClassVar[str] = "max_sum"

    def apply(self, score: torch.Tensor | None, scope: Scope, feature: torch.Tensor) -> torch.Tensor:
        return max_sum_keep.overload(feature, score, *self.room(scope))
