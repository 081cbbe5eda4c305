"""medoids_keep: the medoids of as many groups of tokens as the budget has: the centres of k-medoids.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Budget:  `count` tokens of each segment where count > 0, else permille / 1000 of its tokens, rounded down.
Start:   the longest token of a segment, then each time the one farthest from those taken (Euclidean distance).
Rounds:  every token joins the nearest medoid, a medoid itself; the token of a group with the smallest sum of distances
         to the others is its new medoid. Ends when no medoid moved, or after `rounds` rounds.
Ties:    the lower index, among tokens as among medoids; numbers within a millionth of the best one count as equal, and
         tokens whose distance is below a thousandth of their lengths as copies.
NaN:     a token that is not finite is taken as zeros.
Memory:  O(B V^2): the distances of any two tokens of a segment are the method.

Reference: CenterCLIP, arXiv 2205.00823 (k-medoids++ with KKZ start). Deviation: the published distances are Minkowski
distances in the precision of `cdist`, whose rounding decides ties; the published stop is a small total move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.greedy import EQUAL, Greedy, best, of_slots
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


def _distances(feature: torch.Tensor) -> torch.Tensor:
    """[B, V, V] float32, symmetric to the last bit, 0 of a token with itself."""
    # Distances stay as they are when everything is moved; near zero their rounding is smallest.
    share = torch.ones(1, feature.shape[1], device=feature.device) / max(feature.shape[1], 1)
    feature = feature - share @ feature
    square = (feature * feature) @ torch.ones(feature.shape[2], 1, device=feature.device)
    apart = (square + square.transpose(1, 2) - 2.0 * feature @ feature.transpose(1, 2)).clamp(min=0.0)
    place = torch.arange(feature.shape[1], device=feature.device)
    apart = torch.where(place[:, None] == place, 0.0, (apart + apart.transpose(1, 2)) * 0.5)
    return torch.where(apart < SAME * (square + square.transpose(1, 2)), 0.0, apart).sqrt()


def _moved(medoid: torch.Tensor, distance: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """[B, V] bool: the token of each group with the smallest sum of distances to the others of its group."""
    place = torch.arange(medoid.shape[1], device=medoid.device)
    far = torch.finfo(torch.float32).max
    ones = torch.ones(medoid.shape[1], 1, device=medoid.device)
    to_medoid = together & medoid[:, None, :]
    group = torch.where(medoid, place, _first_lowest(torch.where(to_medoid, distance, far)))
    same = together & (group[:, :, None] == group[:, None, :]) & (to_medoid.float() @ ones > 0)
    apart = torch.where(same, distance, 0.0) @ ones  # [B, V, 1]
    lowest = _first_lowest(torch.where(same, apart.transpose(1, 2), far))
    return same.diagonal(dim1=1, dim2=2) & (lowest == place)


def _first_lowest(values: torch.Tensor) -> torch.Tensor:
    """[B, V] int64: where along the last axis of `values [B, V, V]` the lowest stands, the first of equals."""
    # A row and a column more keep V = 0 defined, here and in ONNX Runtime.
    values = torch.nn.functional.pad(values, (0, 1, 1, 0), value=torch.finfo(torch.float32).max)
    low = values.amin(2, keepdim=True)
    return (values <= low + EQUAL * low).float().argmax(2)[:, 1:]


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
    distance = _distances(feature)
    long = ((feature * feature) @ torch.ones(feature.shape[2], 1, device=feature.device)).sqrt().squeeze(2)
    budget = budgets(counts, permille, count)
    valid = segment >= 0
    place = torch.arange(segment.shape[1], device=segment.device)
    together = (segment[:, :, None] == segment[:, None, :]) & valid[:, :, None]

    def take(number: torch.Tensor, medoid: torch.Tensor, apart: torch.Tensor) -> State:
        picked = best(torch.where(number == 0, long, apart), valid & ~medoid, segment, counts, 0.0)
        picked = per_token(picked, segment)
        taken = (place == picked) & (number < per_token(budget, segment))
        return medoid | taken, torch.minimum(apart, distance.gather(2, picked[:, :, None]).squeeze(2))

    # Whether, not which: two states of V would be of two sizes to a tracer where only the run tells V.
    def move(number: torch.Tensor, medoid: torch.Tensor, moving: torch.Tensor) -> State:
        moved = _moved(medoid, distance, together)
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
