"""medoids_keep: the medoids of as many groups of tokens as the budget has: the centres of k-medoids.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py).
Start:   the longest token of a segment, then each time the one farthest from those taken (Euclidean distance).
Rounds:  every token joins the nearest medoid, a medoid itself; the token of a group with the smallest sum of distances
         to the others is its new medoid. Ends when no medoid moved, or after `rounds` rounds.
Ties:    the lower index, among tokens as among medoids; numbers within a millionth of the best one count as equal, and
         tokens whose distance is below a thousandth of their lengths as copies.
NaN:     a token that is not finite is taken as zeros.
Memory:  O(B V (D + BLOCK)): distances are computed anew for each move.

Reference: CenterCLIP, arXiv 2205.00823 (k-medoids++ with KKZ start). Deviation: the published distances are Minkowski
distances in the precision of `cdist`, whose rounding decides ties; the published stop is a small total move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.blocks import by_rows
from tvc.kernels.greedy import EQUAL, Greedy, above_nothing, best, of_slots, rows
from tvc.kernels.loop import State, repeat
from tvc.kernels.op import Scope, op, primitive
from tvc.kernels.segments import budgets, pack, per_token

SAME = 1e-6  # squared distances below this share of the squared lengths are those of copies


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    feature = torch.randn(3, 9, 6)
    yield "share-half", (feature, segment, counts, 500, 0, 4, 100)
    yield "share-all", (feature, segment, counts, 1000, 0, 9, 100)
    yield "count-three", (feature, segment, counts, 0, 3, 6, 100)
    yield "keep-one", (feature, segment, counts, 0, 1, 2, 100)
    yield "no-round", (feature, segment, counts, 0, 2, 4, 0)
    yield "one-round", (feature, segment, counts, 0, 2, 4, 1)
    yield "count-above-all", (feature, segment, counts, 0, 20, 40, 100)
    yield "all-equal", (torch.ones(3, 9, 4), segment, counts, 500, 0, 4, 100)
    yield "zeros", (torch.zeros(3, 9, 4), segment, counts, 0, 2, 4, 100)
    yield "nan", (feature.masked_fill(torch.rand(3, 9, 1) > 0.7, float("nan")), segment, counts, 0, 2, 4, 100)
    shuffled = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 0, 1]])
    yield "interleaved", (torch.randn(1, 10, 4), shuffled, torch.tensor([[5, 4]]), 0, 2, 4, 100)
    nothing = (feature[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64))
    yield "no-visual-token", (*nothing, 500, 0, 0, 100)
    yield "one-token", (torch.randn(1, 1, 3), torch.tensor([[0]]), torch.tensor([[1]]), 1000, 0, 1, 100)
    whole = (torch.randn(1, 61, 8), torch.zeros(1, 61, dtype=torch.int64), torch.tensor([[61]]))
    yield "V61", (*whole, 0, 10, 10, 100)
    spots = torch.tensor([[0.0, 0.1, 5.0, 5.1, 5.2, -4.0, -4.1]])[:, :, None]
    yield "on-a-line", (spots, torch.zeros(1, 7, dtype=torch.int64), torch.tensor([[7]]), 0, 3, 3, 100)


def _fake(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
    rounds: int,
) -> torch.Tensor:
    return of_slots(segment, slots)


class _Distances:
    """Distances between tokens, a block of rows at a time; 0 of a token with itself and with its copies."""

    def __init__(self, feature: torch.Tensor):
        # Distances stay as they are when everything is moved; near zero their rounding is smallest.
        share = torch.ones(1, feature.shape[1], device=feature.device) / max(feature.shape[1], 1)
        self.near_zero = feature - share @ feature
        ones = torch.ones(feature.shape[2], 1, device=feature.device)
        self.square = (self.near_zero * self.near_zero) @ ones  # [B, V, 1]

    def of(self, at: torch.Tensor) -> torch.Tensor:
        """[B, b, V] float32: from each of the tokens `at [B, b]` to all."""
        both = self.square.squeeze(2).gather(1, at)[:, :, None] + self.square.transpose(1, 2)
        apart = both - 2.0 * rows(self.near_zero, at) @ self.near_zero.transpose(1, 2)
        itself = at[:, :, None] == torch.arange(self.square.shape[1], device=at.device)
        return torch.where(itself | (apart < SAME * both), 0.0, apart).sqrt()


def _moved(medoid: torch.Tensor, distances: _Distances, segment: torch.Tensor) -> torch.Tensor:
    """[B, V] bool: the token of each group with the smallest sum of distances to the others of its group."""
    device, shape = segment.device, segment.shape
    place, far = torch.arange(shape[1], device=device), torch.finfo(torch.float32).max

    def join(at: torch.Tensor, new: torch.Tensor, nearest: torch.Tensor) -> State:
        together = (segment.gather(1, at)[:, :, None] == segment[:, None, :]) & medoid[:, None, :]
        apart = above_nothing(torch.where(together, -distances.of(at), -far))
        top = apart.amax(2, keepdim=True)
        first = (apart >= top + EQUAL * top).float().argmax(2)
        return (nearest.scatter(1, at, torch.where(top.squeeze(2) > -far, first, -1)),)

    nearest = by_rows(join, (torch.zeros_like(segment),), segment)[0]
    group = torch.where(medoid, place, torch.where(segment >= 0, nearest, -1))

    def add(at: torch.Tensor, new: torch.Tensor, total: torch.Tensor) -> State:
        together = group.gather(1, at)[:, :, None] == group[:, None, :]
        ones = torch.ones(segment.shape[1], 1, device=device)
        return (total.scatter(1, at, (torch.where(together, distances.of(at), 0.0) @ ones).squeeze(2)),)

    total = by_rows(add, (torch.zeros(shape, device=device),), segment)[0]
    # Column 0 takes what is in no group.
    room = torch.full((shape[0], shape[1] + 1), far, device=device)
    low = room.scatter_reduce(1, group + 1, total, "amin").gather(1, group + 1)
    lowest = (group >= 0) & (total <= low + EQUAL * low)
    room = torch.zeros_like(room, dtype=torch.int64) + shape[1]
    first = room.scatter_reduce(1, group + 1, torch.where(lowest, place, shape[1]), "amin")
    return lowest & (first.gather(1, group + 1) == place)


@op(_cases, fake=_fake)
def medoids_keep(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
    rounds: int,
) -> torch.Tensor:
    """[B, slots] int64: the medoids of each segment."""
    feature = torch.nan_to_num(torch.where((segment >= 0)[:, :, None], feature.float(), 0.0), 0.0, 0.0, 0.0)
    distances = _Distances(feature)
    long = ((feature * feature) @ torch.ones(feature.shape[2], 1, device=feature.device)).sqrt().squeeze(2)
    budget = budgets(counts, permille, count)
    valid = segment >= 0
    place = torch.arange(segment.shape[1], device=segment.device)

    def take(number: torch.Tensor, medoid: torch.Tensor, apart: torch.Tensor) -> State:
        picked = best(torch.where(number == 0, long, apart), valid & ~medoid, segment, counts, 0.0)
        taken = (place == per_token(picked, segment)) & (number < per_token(budget, segment))
        to_picked = distances.of(picked).gather(1, segment.clamp(min=0)[:, None, :]).squeeze(1)
        return medoid | taken, torch.minimum(apart, to_picked)

    # Whether, not which: two states of V would be of two sizes to a tracer where only the run tells V.
    def move(number: torch.Tensor, medoid: torch.Tensor, moving: torch.Tensor) -> State:
        moved = _moved(medoid, distances, segment)
        return moved, (moved ^ medoid).any()

    # One column of zeros keeps the largest budget defined for N = 0.
    most = torch.nn.functional.pad(budget, (0, 1)).amax((0, 1))
    start = (torch.zeros_like(valid), torch.full_like(long, torch.finfo(torch.float32).max))
    medoid = repeat(take, start, most)[0]
    last = torch.full((), 1, dtype=torch.int64, device=segment.device) * rounds
    medoid = repeat(move, (medoid, valid.any()), last, lambda medoid, moving: moving)[0]
    return pack(medoid, slots)


@primitive
class Medoids(Greedy):
    """Tokens are grouped by k-medoids, and the medoid of each group stays."""

    key: ClassVar[str] = "medoids"
    needs_score: ClassVar[bool] = False
    rounds: int = Field(100, ge=0, description="how often medoids may move; 0: they stay where they start")

    def apply(self, score: torch.Tensor | None, scope: Scope, feature: torch.Tensor) -> torch.Tensor:
        return medoids_keep.overload(feature, *self.room(scope), self.rounds)
