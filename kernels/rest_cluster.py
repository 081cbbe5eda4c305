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
Ties:    the lower index wins; of equally dense tokens the lower index counts as denser. Copies and what counts as equal
         as in peaks.py.
Memory:  O(B R BLOCK) for the R = V * permille // 1000 + N slots of the pool: never all distances at once.

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
from tvc.kernels import peaks
from tvc.kernels.blocks import by_rows
from tvc.kernels.budget import Budget, OwnRounding
from tvc.kernels.loop import State
from tvc.kernels.op import Rest, Scope, op, primitive
from tvc.kernels.segments import mark, pack, per_token, ranks, rows_at


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


def _fake(
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
    stays = (feature.shape[0], chosen.shape[1] + slots)
    return chosen.new_empty(stays), feature.new_empty(*stays, feature.shape[2]), size.new_empty(stays)


def _joined(values: torch.Tensor, weights: torch.Tensor, to: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, R, D] mean of the values, [B, R, 1] sum of the weights) of the members of each centre, `to [B, R]`."""
    real = (to >= 0).float()[:, :, None]

    def join(at: torch.Tensor, new: torch.Tensor, mean: torch.Tensor, gained: torch.Tensor) -> State:
        joins = (to[:, None, :] == at[:, :, None]).float()  # [B, b centres, R members]
        average = joins @ values / (joins @ real).clamp(min=1.0)
        place = at[:, :, None]
        return mean.scatter(1, place.expand_as(average), average), gained.scatter(1, place, joins @ weights)

    start = (torch.zeros_like(values), torch.zeros_like(weights))
    mean, gained = by_rows(join, start, to)
    return mean, gained


@op(_cases, fake=_fake)
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
    number = torch.minimum(members, members // per + 1)
    centre, to = peaks.centres(values, group, members, number, number, room // per + 1)
    mean, gained = _joined(values, weights, torch.where(group < 0, -1, to))
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
    pool: OwnRounding = Field(
        Budget(permille=300), description="the best-scored share of the other tokens; the rest drops"
    )
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
