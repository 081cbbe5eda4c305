"""anchored_score: the best tokens by one score and their neighbours in the grid go before all others of another score.

Shapes:  anchor [B, V] float, fill [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, columns [B, V]
         int64 from 1 on: how far it is to the next row -> [B, V] float32, pads 0
Rule:    `fill`, and above it by twice its largest magnitude in the sample for the tokens that are anchors or near one.
Anchors: of a segment's budget T (`count` where count > 0, else a share of its tokens (portions.py)) the share
         `share` / 1000 is for groups of five: T share / 5000 anchors, to the nearest number, halves to the even one.
Near:    places p - 1, p + 1, p - columns and p + columns of the anchor at place p of its segment, moved to the first or
         the last place where they lie outside. The end of a row is followed by the start of the next one.
Ties:    the lower index is the anchor. NaN in `anchor` ranks last and in `fill` stays NaN, anchor or not.
Memory:  O(B V).

Reference: HiPrune, arXiv 2508.00553. Deviation: where anchors and neighbours are more than the budget, the best of them
by `fill` are taken; the published code fails there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.grid import Gridded
from tvc.kernels.op import Scope, Select, op, primitive
from tvc.kernels.segments import budgets, per_token, ranks, starts
from tvc.kernels.select_top import top_keep


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    anchor, fill = torch.randn(3, 7), torch.rand(3, 7)
    two, three = torch.full_like(segment, 2), torch.full_like(segment, 3)
    yield "share-half", (anchor, fill, segment, counts, three, 500, 0, 1000)
    yield "count-five", (anchor, fill, segment, counts, two, 0, 5, 1000)
    yield "no-anchor", (anchor, fill, segment, counts, three, 0, 1, 100)
    yield "wide-rows", (anchor, fill, segment, counts, three + 47, 0, 5, 1000)
    yield "equal-scores", (torch.zeros(3, 7), torch.zeros(3, 7), segment, counts, three, 1000, 0, 1000)
    yield "negative-fill", (anchor, -fill, segment, counts, three, 1000, 0, 1000)
    poisoned = anchor.masked_fill(torch.rand(3, 7) > 0.6, float("nan"))
    unknown = fill.masked_fill(torch.rand(3, 7) > 0.8, float("nan"))
    yield "nan", (poisoned, unknown, segment, counts, three, 0, 5, 1000)
    yield "ragged", (anchor, fill, segment, counts, torch.where(segment == 1, 3, two), 0, 5, 1000)
    interleaved = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 0, 1]])
    mixed = (torch.randn(1, 10), torch.rand(1, 10), interleaved, torch.tensor([[5, 4]]), interleaved % 2 + 1)
    yield "interleaved", (*mixed, 1000, 0, 1000)
    single = torch.zeros(1, 1, dtype=torch.int64)
    yield "one-token", (torch.randn(1, 1), torch.rand(1, 1), single, single + 1, single + 1, 0, 1, 100)
    nothing = (anchor[:, :0], fill[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64), three[:, :0])
    yield "no-visual-token", (*nothing, 500, 0, 1000)
    whole = torch.zeros(1, 576, dtype=torch.int64)
    yield "V576", (torch.randn(1, 576), torch.rand(1, 576), whole, torch.tensor([[576]]), whole + 24, 334, 0, 100)


def anchors_of(budget: torch.Tensor, share: int) -> torch.Tensor:
    """[B, N] int64: budget * share / 5000, to the nearest whole number, halves to the even one."""
    whole = budget * share // 5000
    twice = 2 * (budget * share - whole * 5000)
    return whole + ((twice > 5000) | ((twice == 5000) & (whole % 2 == 1))).long()


@op(_cases)
def anchored_score(
    anchor: torch.Tensor,
    fill: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    permille: int,
    count: int,
    share: int,
) -> torch.Tensor:
    """[B, V] float32: `fill`, raised for the anchors of each segment and their neighbours."""
    width, valid = segment.shape[1], segment >= 0
    amount = anchors_of(budgets(counts, permille, count), share)
    first = valid & (ranks(segment, counts, anchor.float()) < per_token(amount, segment))
    place, start = ranks(segment, counts), starts(segment, counts)
    last = per_token(counts, segment) - 1
    # One more column takes what marks nothing.
    marked = torch.zeros(segment.shape[0], width + 1, dtype=torch.int64, device=segment.device)
    for offset in (0, -1, 1, -columns, columns):
        spot = start + torch.minimum((place + offset).clamp(min=0), last)
        spot = torch.where(first, spot, width)
        marked = marked.scatter(1, spot, torch.ones_like(spot))
    near = valid & (marked.gather(1, torch.where(valid, start + place, width)) > 0)
    fill = fill.float()
    magnitude = torch.where(valid & ~torch.isnan(fill), fill.abs(), 0.0)
    # One more column keeps the largest defined for V = 0.
    above = 2 * torch.nn.functional.pad(magnitude, (0, 1)).amax(1, keepdim=True).clamp(min=1e-6)
    return torch.where(valid, torch.where(near, fill + above, fill), 0.0)


@primitive
class Anchors(Gridded, Select):
    """The best tokens by the first score and their neighbours in the grid stay, then the best by the second."""

    key: ClassVar[str] = "anchors"
    shorthand: ClassVar[str | None] = "keep"
    terms: ClassVar[int] = 2
    keep: Budget = Field(description="what stays of each scope")
    share: int = Field(
        100, ge=0, le=1000, description="thousandths of the budget for anchors with four neighbours each"
    )

    def joined(self, terms: list[torch.Tensor], scope: Scope, columns: torch.Tensor | None = None) -> torch.Tensor:
        budget, rows = self.keep, self.rows(scope, columns)
        rule = (*budget.numbers, self.share)
        score: torch.Tensor = anchored_score.overload(*terms, scope.segment, scope.counts, rows, *rule)
        return score

    def apply(self, score: torch.Tensor | None, scope: Scope, columns: torch.Tensor | None = None) -> torch.Tensor:
        budget = self.keep
        slots = budget.slots(scope.segment.shape[1], scope.number)
        return top_keep.overload(score, scope.segment, scope.counts, *budget.numbers, slots)

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]
