"""max_min_keep: tokens of each segment that lie far apart; the next one is the farthest from those taken.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Rule:    distance = 1 - cosine, in float32. First the token whose nearest neighbour is farthest; then again and again
         the free token whose nearest taken one is farthest. A token without a direction (zeros, NaN) has distance 1 to
         all.
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py).
Ties:    the lower index wins, within 1e-6 of the best value; a token is never taken twice.
Memory:  O(B V D), never V x V.

Reference: DivPrune, arXiv 2503.02175 (max-min diversity). Deviation: the published code computes distances in the
model's dtype, and takes its first token again once only duplicates are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.kernels.greedy import Greedy, directions, nearest, of_slots, take, to_picked
from tvc.kernels.loop import State
from tvc.kernels.op import Scope, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    feature = torch.randn(3, 7, 8)
    yield "share-half", (feature, segment, counts, 500, 0, 3)
    yield "share-all", (feature, segment, counts, 1000, 0, 7)
    yield "share-nearest", (feature, segment, counts, 500, -3001, 5)
    yield "count-two", (feature, segment, counts, 0, 2, 4)
    yield "count-above-all", (feature, segment, counts, 0, 9, 18)
    yield "keep-one", (feature, segment, counts, 0, 1, 2)
    yield "all-equal", (torch.ones(3, 7, 8), segment, counts, 500, 0, 3)
    yield "zeros", (torch.zeros(3, 7, 8), segment, counts, 0, 2, 4)
    # Signs: cosines are exact in every dtype, and many of them are equal.
    yield "tied", (torch.randint(0, 2, (3, 7, 4)) * 2.0 - 1.0, segment, counts, 0, 2, 4)
    yield "nothing", (feature[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64), 250, 0, 0)
    yield "interleaved", (torch.randn(1, 6, 3), torch.tensor([[1, 0, 1, 0, -1, 1]]), torch.tensor([[2, 3]]), 0, 1, 2)
    yield "one-token", (torch.randn(1, 1, 4), torch.tensor([[0]]), torch.tensor([[1]]), 0, 1, 1)


def _fake(
    feature: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int
) -> torch.Tensor:
    return of_slots(segment, slots)


@op(_cases, fake=_fake)
def max_min_keep(
    feature: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that lie far apart."""
    unit = directions(feature)
    alone = -nearest(unit, segment)

    def value(number: torch.Tensor, closest: torch.Tensor) -> torch.Tensor:
        return torch.where(number == 0, alone, -closest)

    def after(number: torch.Tensor, picked: torch.Tensor, closest: torch.Tensor) -> State:
        return (torch.maximum(closest, to_picked(unit, picked, segment)),)

    closest = torch.full(segment.shape, -2.0, device=segment.device)
    return take(value, after, (closest,), segment, counts, permille, count, slots, unit=1.0)


@primitive
class MaxMin(Greedy):
    """Tokens that lie far apart stay: each next one is the farthest from those taken so far (max-min diversity)."""

    key: ClassVar[str] = "max_min"
    needs_score: ClassVar[bool] = False

    def apply(self, score: torch.Tensor | None, scope: Scope, feature: torch.Tensor) -> torch.Tensor:
        return max_min_keep.overload(feature, *self.room(scope))
