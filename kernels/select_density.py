"""density_keep: of the best-scored tokens the densest ones that lie farther than a cutoff from each other.

Shapes:  metric [B, V, d] float, score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, K] int64 ascending, pads (-1) first; K = the most that any sample of the batch keeps (an unbacked size)
Pool:    of each segment the `count` best-scored tokens where count > 0, else a share of its tokens
         (portions.py). The others take no part.
Rule:    distance = 1 - cosine of the metric, at least 0. A token's density is the sum of exp(-(distance / 2)^2) over
         the pool of its segment. In the order of falling density a token stays unless one that stays is within the
         cutoff.
Ties:    the lower index wins, among scores as among densities (equal within a millionth).   NaN: scores lowest.
Zeros:   what has no direction is at distance 1 from all others.
Memory:  O(B V BLOCK): never all distances at once.

Reference: PACT, arXiv 2504.08966 (distance-bounded density peaks, in their sequential definition).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.blocks import by_rows
from tvc.kernels.budget import Budget
from tvc.kernels.greedy import best, directions, rows
from tvc.kernels.loop import State, repeat
from tvc.kernels.op import Scope, Select, Tap, op, primitive
from tvc.kernels.segments import budgets, pack, per_token, ranks
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    metric, score = torch.randn(3, 9, 3), torch.randn(3, 9)
    plain = (metric, score, segment, counts)
    yield "share-half", (*plain, 500, 0, 0.5)
    yield "share-all", (*plain, 1000, 0, 0.7)
    yield "count-five", (*plain, 0, 5, 0.3)
    yield "keep-one", (*plain, 0, 1, 0.3)
    yield "no-cutoff", (*plain, 1000, 0, 0.0)
    yield "cutoff-above-all", (*plain, 1000, 0, 2.5)
    yield "all-equal", (torch.ones(3, 9, 3), torch.zeros(3, 9), segment, counts, 600, 0, 0.2)
    yield "no-direction", (torch.zeros(3, 9, 3), score, segment, counts, 600, 0, 0.2)
    yield "nan", (metric, score.masked_fill(score > 0.4, float("nan")), segment, counts, 600, 0, 0.4)
    shuffled = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 0, 1]])
    mixed = (torch.randn(1, 10, 3), torch.randn(1, 10), shuffled, torch.tensor([[5, 4]]))
    yield "interleaved", (*mixed, 0, 4, 0.5)
    nothing = (metric[:, :0], score[:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*nothing, 500, 0, 0.5)
    one = (torch.randn(1, 1, 3), torch.ones(1, 1), torch.tensor([[0]]), torch.tensor([[1]]))
    yield "one-token", (*one, 1000, 0, 0.2)
    whole = (torch.randn(1, 301, 4), torch.randn(1, 301), torch.zeros(1, 301, dtype=torch.int64), torch.tensor([[301]]))
    yield "V301", (*whole, 550, 0, 0.21)


def _fake(
    metric: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    cutoff: float,
) -> torch.Tensor:
    slots = torch.library.get_ctx().new_dynamic_size()
    torch._check(slots <= segment.shape[1])
    return segment.new_empty(segment.shape[0], slots)


def _densities(unit: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[B, V] float32 of the tokens in `group [B, V]` (-1: none); 0 for the others."""

    def block(at: torch.Tensor, new: torch.Tensor, density: torch.Tensor) -> State:
        together = (group.gather(1, at)[:, :, None] == group[:, None, :]) & (group >= 0)[:, None, :]
        itself = at[:, :, None] == torch.arange(group.shape[1], device=group.device)
        apart = torch.where(itself, 0.0, (1.0 - rows(unit, at) @ unit.transpose(1, 2)).clamp(min=0.0))
        near = torch.where(together, (-(apart * apart) / 4.0).exp(), 0.0)
        return (density.scatter(1, at, near.sum(2)),)

    nothing = torch.zeros(group.shape, device=group.device)
    return by_rows(block, (nothing,), group)[0]


@op(_cases, fake=_fake)
def density_keep(
    metric: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    cutoff: float,
) -> torch.Tensor:
    """[B, K] int64: the centres of each segment; K is the largest number of a sample."""
    score = score.float()
    score = torch.where(torch.isnan(score), torch.finfo(torch.float32).min, score)
    pool = (segment >= 0) & (ranks(segment, counts, score) < per_token(budgets(counts, permille, count), segment))
    unit = directions(metric)
    density = _densities(unit, torch.where(pool, segment, -1))
    place = torch.arange(segment.shape[1], device=segment.device)

    def take(number: torch.Tensor, free: torch.Tensor, centre: torch.Tensor) -> State:
        picked = best(density, free, segment, counts, 0.0)
        # Of a segment without a free token the pick means nothing.
        mine = per_token(picked, segment)
        chosen = (place == mine) & free
        live = chosen.gather(1, mine)
        cosine = (unit @ rows(unit, picked).transpose(1, 2)).gather(2, segment.clamp(min=0)[:, :, None]).squeeze(2)
        covered = live & ((1.0 - cosine).clamp(min=0.0) <= cutoff)
        return free & ~covered & ~chosen, centre | chosen

    # As many rounds as a segment has tokens are always enough; one more column keeps that defined for N = 0.
    most = torch.nn.functional.pad(counts, (0, 1)).amax((0, 1))
    _, centre = repeat(take, (pool, torch.zeros_like(pool)), most, lambda free, centre: free.any())
    return pack(centre, largest(centre))


@primitive
class Density(Select):
    """Of the best-scored tokens the densest stay, no two of them nearer to each other than a cutoff."""

    key: ClassVar[str] = "density"
    exact: ClassVar[bool] = False
    components: ClassVar[tuple[str, ...]] = ("language",)
    keep: Budget = Field(description="the best-scored tokens of each scope, among which the centres are found")
    cutoff: float = Field(gt=0, le=2, allow_inf_nan=False, description="1 - cosine of the keys beyond which both stay")
    layer: str = Field("self", description="the layer of the keys, those of all heads side by side")

    def taps(self) -> dict[str, Tap]:
        return {"metric": Tap("key", self.layer, ("joined",))}

    def apply(self, score: torch.Tensor | None, scope: Scope, metric: torch.Tensor) -> torch.Tensor:
        rule = (*self.keep.numbers, self.cutoff)
        return density_keep.overload(metric, score, scope.segment, scope.counts, *rule)

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound: how many are apart is known only at run time."""
        return [self.keep.kept(count) for count in counts]
