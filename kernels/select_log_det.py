"""log_det_keep: tokens of each segment that span the largest volume, relevant ones counting for more.

Shapes:  feature [B, V, D] float, relevance [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Rule:    greedy maximum of the determinant of K[i, j] = r[i] cos(i, j) r[j] over the tokens taken (the mode of a
         determinantal point process), by the incremental Cholesky factor: each round takes the free token with the
         largest variance that those taken do not explain. Float32. r = relevance + 1e-6, NaN counting as 0.
         A token without a direction (zeros, NaN) explains nothing and has no variance.
Rank:    what the tokens taken explain wholly has variance 0; where nothing else is left the lowest indices are taken.
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py).
Ties:    the lower index wins, within 1e-6 of the best value; a token is never taken twice.
Memory:  O(B V (D + slots)), never V x V.

Reference: CDPruner, arXiv 2506.10967 (kernel and greedy rule). Deviation: the published code divides by zero where the
variance is used up and may then take a token twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.kernels.greedy import Greedy, directions, of_slots, take, to_picked
from tvc.kernels.loop import State
from tvc.kernels.op import Scope, op, primitive
from tvc.kernels.segments import per_token

# Below this share of a token's own variance what is left of it is rounding.
EXPLAINED = 1e-6


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    feature, relevance = torch.randn(3, 7, 8), torch.rand(3, 7)
    yield "share-half", (feature, relevance, segment, counts, 500, 0, 3)
    yield "share-all", (feature, relevance, segment, counts, 1000, 0, 7)
    yield "count-two", (feature, relevance, segment, counts, 0, 2, 4)
    yield "count-above-all", (feature, relevance, segment, counts, 0, 9, 18)
    yield "keep-one", (feature, relevance, segment, counts, 0, 1, 2)
    yield "all-equal", (torch.ones(3, 7, 8), torch.ones(3, 7), segment, counts, 500, 0, 3)
    yield "irrelevant", (feature, torch.zeros(3, 7), segment, counts, 0, 2, 4)
    # Axes: what is explained is exactly nothing or everything, in every dtype.
    axes = torch.eye(4)[torch.randint(0, 4, (3, 7))]
    yield "fewer-directions-than-budget", (axes, torch.ones(3, 7), segment, counts, 800, 0, 5)
    nothing = (feature[:, :0], relevance[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64))
    yield "nothing", (*nothing, 250, 0, 0)
    yield "one-token", (torch.randn(1, 1, 4), torch.ones(1, 1), torch.tensor([[0]]), torch.tensor([[1]]), 0, 1, 1)


def _fake(
    feature: torch.Tensor,
    relevance: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    return of_slots(segment, slots)


@op(_cases, fake=_fake)
def log_det_keep(
    feature: torch.Tensor,
    relevance: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that span the largest volume."""
    unit = directions(feature)
    weight = torch.nan_to_num(relevance.float(), 0.0) + 1e-6
    ones = torch.ones(unit.shape[2], 1, device=unit.device)
    own = weight * weight * ((unit * unit) @ ones).squeeze(2)
    # Row s of the factor: how much of each token the s-th token of its segment explains. One row more, so that there
    # is one for V = 0.
    factor = own.new_zeros(segment.shape[0], slots + 1, segment.shape[1])
    steps = torch.arange(slots + 1, device=segment.device)[:, None]

    def value(number: torch.Tensor, left: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return left

    def after(number: torch.Tensor, picked: torch.Tensor, left: torch.Tensor, factor: torch.Tensor) -> State:
        token = per_token(picked, segment)  # [B, V] the one taken in each token's segment
        shared = weight * weight.gather(1, token) * to_picked(unit, picked, segment)
        explained = (factor * factor.gather(2, token[:, None, :].expand_as(factor))).sum(1)
        rest, whole = left.gather(1, token), own.gather(1, token)
        usable = rest > EXPLAINED * whole
        row = torch.where(usable, (shared - explained) / rest.clamp(min=1e-30).sqrt(), 0.0)
        now = left - row * row
        left = torch.where(now > EXPLAINED * own, now, 0.0)
        return left, torch.where(steps == number, row[:, None, :], factor)

    return take(value, after, (own.clone(), factor), segment, counts, permille, count, slots)


@primitive
class LogDet(Greedy):
    """Tokens that span the largest volume stay, weighted by the score if there is one (determinantal point process)."""

    key: ClassVar[str] = "log_det"
    needs_score: ClassVar[bool] = False
    weighs_score: ClassVar[bool] = True

    def apply(self, score: torch.Tensor | None, scope: Scope, feature: torch.Tensor) -> torch.Tensor:
        relevance = torch.ones(scope.segment.shape, device=scope.segment.device) if score is None else score
        return log_det_keep.overload(feature, relevance, *self.room(scope))
