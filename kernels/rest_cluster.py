"""merge_clusters: the best of the tokens that were not chosen are grouped by density peaks, each group is averaged.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64,
         chosen [B, K] int64 (-1 pads), score [B, V] float
         -> index [B, K + slots] int64 ascending, pads (-1) first; feature [B, K + slots, D] and size like the inputs
Pool:    of the d tokens of a segment that were not chosen, the best-scored d * permille // 1000 + 1 (all where that is
         more); the others are dropped.
Centres: a pool of m tokens has c = m // per + 1 of them (m where that is more). With the squared distance over D
         channels divided by D: density = exp(-mean of the c smallest, the token's own 0 among them); lead = distance to
         the nearest denser token of the pool, or the pool's largest distance for the densest; the c tokens with the
         highest density * lead are centres.
Merging: every token of the pool goes to the nearest centre, a centre to itself. A centre's place takes the mean of its
         group (sums float32); sizes add up. Chosen tokens stay as they are.
Ties:    the lower index wins; of equally dense tokens the lower index counts as denser.
Memory:  O(B R R) for the R = V * permille // 1000 + N slots of the pool: the method is about that matrix.

Reference: SparseVLM, arXiv 2410.04417 (token recycling with DPC-kNN). Deviations: the published code adds noise of 1e-6
to densities, which only settles ties; it divides by 1e-6 more than the number of members.
"""

from __future__ import annotations

import fractions
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from tvc.errors import PolicyError
from tvc.kernels.budget import Budget
from tvc.kernels.op import Rest, Scope, op, primitive
from tvc.kernels.segments import mark, pack, per_token, ranks, rows_at

FAR = torch.finfo(torch.float32).max


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, *[0] * 7, *[1] * 6], [0] * 15, [-1, 0, *[1] * 13]])
    counts = torch.tensor([[7, 6], [15, 0], [1, 13]])
    chosen = torch.tensor([[-1, 3, 11], [1, 4, 8], [-1, -1, 5]])
    feature, score = torch.randn(3, 15, 6), torch.randn(3, 15)
    size = torch.randint(1, 4, (3, 15)).float()
    plain = (feature, size, segment, counts, chosen, score)
    for permille, per in ((300, 10), (600, 3), (1000, 2), (1000, 1)):
        room = 15 * permille // 1000 + 2
        yield f"permille{permille}-per{per}", (*plain, permille, per, room, room // per + 2)
    yield "more-slots", (*plain, 600, 3, 20, 12)
    equal = (torch.ones(3, 15, 6), size, segment, counts, chosen, torch.zeros(3, 15))
    yield "all-equal", (*equal, 1000, 3, 17, 7)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    yield "none-chosen", (feature, size, segment, counts, nothing, score, 400, 4, 8, 4)
    every = torch.where(segment < 0, -1, torch.arange(15))
    yield "all-chosen", (feature, size, segment, counts, every, score, 300, 10, 6, 2)
    empty = (feature[:, :0], size[:, :0], segment[:, :0])
    yield "no-visual-token", (*empty, torch.zeros_like(counts), nothing, score[:, :0], 300, 10, 2, 2)
    yield "no-segment", (*empty, torch.zeros(3, 0, dtype=torch.int64), nothing, score[:, :0], 300, 10, 0, 0)
    one = (torch.randn(1, 1, 6), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1]]))
    yield "one-token", (*one, nothing[:1], torch.ones(1, 1), 300, 10, 1, 1)


def _pooled(
    feature: torch.Tensor, group: torch.Tensor, members: torch.Tensor, per: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(centre [B, R] bool, number of the centre of each slot [B, R] int64) of a pool with `members [B, N]` tokens."""
    width, slots = feature.shape[2], group.shape[1]
    real = group >= 0
    number = torch.minimum(members, members // per + 1)  # [B, N] centres
    # Distances stay as they are when everything is moved; near zero their rounding is smallest.
    share = real.float() / real.sum(1, keepdim=True).clamp(min=1)
    near_zero = torch.where(real[:, :, None], feature - share[:, None, :] @ feature, 0.0)
    square = (near_zero * near_zero) @ torch.ones(width, 1, device=feature.device)  # [B, R, 1]
    distance = (square + square.transpose(1, 2) - 2.0 * near_zero @ near_zero.transpose(1, 2)).clamp(min=0.0) / width
    place = torch.arange(slots, device=group.device)
    itself = place[:, None] == place
    # Symmetric to the last bit, so that mutual neighbours are equally dense.
    distance = torch.where(itself, 0.0, (distance + distance.transpose(1, 2)) * 0.5)
    together = (group[:, :, None] == group[:, None, :]) & real[:, :, None]
    neighbours = per_token(number, group).clamp(min=1)
    ordered = torch.where(together, distance, FAR).sort(dim=2).values
    closest = torch.where(place < neighbours[:, :, None], ordered, 0.0) @ torch.ones(slots, 1, device=group.device)
    density = torch.where(real, (-closest.squeeze(2) / neighbours).exp(), 0.0)

    first, second = density[:, :, None], density[:, None, :]
    denser = together & ((second > first) | ((second == first) & (place < place[:, None])))
    lead = -_highest(torch.where(denser, -distance, -FAR), -FAR)
    reach = _highest(torch.where(together, distance, -1.0), -1.0)
    # Column 0 takes the pads.
    widest = torch.zeros(group.shape[0], members.shape[1] + 1, device=group.device)
    widest = widest.scatter_reduce(1, torch.where(real, group + 1, 0), torch.where(real, reach, 0.0), "amax")[:, 1:]
    lead = torch.where(lead < FAR, lead, per_token(widest, group)).sqrt()
    centre = real & (ranks(group, members, density * lead) < per_token(number, group))

    to_centre = torch.where(together & centre[:, None, :], -distance, -FAR)
    # One row and one column more, see `_highest`.
    nearest = torch.nn.functional.pad(to_centre, (0, 1, 1, 0), value=-FAR).argmax(2)[:, 1:]
    return centre, torch.where(centre, place, nearest)


def _highest(values: torch.Tensor, floor: float) -> torch.Tensor:
    """[B, R]: the maximum along the last axis of `values [B, R, R]`, none of them below `floor`.

    A row and a column more keep R = 0 defined, here and in ONNX Runtime, which leaves the reduced axis of an empty
    tensor in place.
    """
    return torch.nn.functional.pad(values, (0, 1, 1, 0), value=floor).amax(2)[:, 1:]


@op(_cases)
def merge_clusters(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    permille: int,
    per: int,
    room: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens and of the centres, which stand for their groups."""
    kept = mark(chosen, segment.shape[1])
    left = torch.where(kept, -1, segment)
    dropped = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.int64, device=counts.device)
    dropped = dropped.scatter_add(1, left + 1, torch.ones_like(left))[:, 1:]
    members = torch.minimum(dropped, dropped * permille // 1000 + 1)
    pooled = (left >= 0) & (ranks(left, dropped, score.float()) < per_token(members, left))
    index = pack(pooled, room)
    wide, weight = feature.float(), size.float()[:, :, None]
    values, weights = rows_at(wide, index), rows_at(weight, index)
    group = torch.where(index < 0, -1, per_token(segment, index))
    centre, to = _pooled(values, group, members, per)

    place = torch.arange(index.shape[1], device=index.device)
    joins = ((to[:, None, :] == place[:, None]) & (index >= 0)[:, None, :]).float()  # [B, R centres, R members]
    mean = joins @ values / (joins @ (index >= 0).float()[:, :, None]).clamp(min=1.0)
    gained = joins @ weights
    centres = mark(torch.where(centre, index, -1), segment.shape[1])

    result = pack(kept | centres, chosen.shape[1] + slots)
    # The number of each centre in the pool: where to look up what became of it; -1 for chosen tokens.
    number = torch.where(centres, pooled.cumsum(1) - 1 + (room - pooled.sum(1, keepdim=True)), -1)
    number = torch.where(result < 0, -1, per_token(number, result))
    changed = (number >= 0)[:, :, None]
    merged = torch.where(changed, rows_at(mean, number), rows_at(wide, result)).to(feature.dtype)
    sizes = torch.where(changed, rows_at(gained, number), rows_at(weight, result)).to(size.dtype)
    return result, merged, sizes.squeeze(2)


@primitive
class Cluster(Rest):
    """The best of the other tokens are grouped by density peaks, and each group becomes one token."""

    key: ClassVar[str] = "cluster"
    pool: Budget = Field(Budget(permille=300), description="the best-scored share of the other tokens; the rest drops")
    per: int = Field(10, ge=1, description="tokens of the pool for each group beyond the first")

    @field_validator("pool")
    @classmethod
    def _share(cls, pool: Budget) -> Budget:
        if pool.permille is None:
            raise ValueError("write a share such as 30%")
        return pool

    @property
    def needs_score(self) -> bool:
        return True

    def scaled(self, factor: fractions.Fraction) -> Cluster:
        """As it is: what is dropped, and so the number of groups, follows from the selection."""
        return self

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if score is None:
            raise PolicyError(
                "the pool of a cluster merge needs a score",
                where="rest.cluster",
                got="a step without a score",
                want="a score",
                fix="add `score:` to the step, or write rest: {merge: {targets: {stride: n}}}",
            )
        permille = self.pool.permille or 0
        room = scope.segment.shape[1] * permille // 1000 + scope.number
        sizes = (permille, self.per, room, room // self.per + scope.number)
        merged: tuple[Any, Any, Any] = merge_clusters.overload(
            feature, size, scope.segment, scope.counts, chosen, score, *sizes
        )
        return merged

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        """Chosen tokens and one for each group."""
        left = []
        for count, stays in zip(counts, chosen, strict=True):
            dropped = count - stays
            members = min(dropped, dropped * (self.pool.permille or 0) // 1000 + 1)
            left.append(stays + min(members, members // self.per + 1))
        return left
