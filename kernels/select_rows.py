"""rows_keep: whole rows of the grid of each segment, those with the highest sum of scores.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, columns [B, V] int64 from 1 on, the
         same for all tokens of a segment -> [B, slots] int64 ascending, pads (-1) first
Rows:    places 0..columns-1 of a segment, the next `columns` of them, and so on. Tokens behind the last whole row
         are in none and never stay.
Budget:  `count` tokens of each segment where count > 0, else a share of them (portions.py), down to whole rows.
Ties:    the upper row wins. A row with a NaN ranks last.
Slots:   at least what any sample keeps; a sample that keeps less is padded.
Memory:  O(B V).

Reference: FoPru, arXiv 2411.14164, the row strategy; no published code to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.grid import Gridded
from tvc.kernels.op import Scope, Select, op, primitive
from tvc.kernels.segments import budgets, count_segments, pack, per_token, ranks, starts


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    score = torch.randn(3, 9)
    one, two, three = (torch.full_like(segment, columns) for columns in (1, 2, 3))
    yield "share-half", (score, segment, counts, two, 500, 0, 4)
    yield "share-all", (score, segment, counts, three, 1000, 0, 9)
    yield "one-column", (score, segment, counts, one, 500, 0, 4)
    yield "count-four", (score, segment, counts, three, 0, 4, 6)
    yield "less-than-a-row", (score, segment, counts, three, 0, 2, 0)
    yield "count-above-all", (score, segment, counts, two, 0, 20, 40)
    yield "equal-scores", (torch.zeros(3, 9), segment, counts, two, 500, 0, 4)
    tied = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 0.0, 3.0, 0.0]]).repeat(3, 1)
    yield "tied-rows", (tied, segment, counts, two, 0, 4, 8)
    yield "nan", (score.masked_fill(torch.rand(3, 9) > 0.8, float("nan")), segment, counts, two, 500, 0, 4)
    ragged = torch.where(segment == 1, 3, two)
    yield "ragged", (score, segment, counts, ragged, 600, 0, 6)
    yield "ragged-count", (score, segment, counts, ragged, 0, 3, 6)
    interleaved = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 0, 1]])
    yield "interleaved", (torch.randn(1, 10), interleaved, torch.tensor([[5, 4]]), interleaved % 2 + 1, 0, 3, 6)
    nothing = (score[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64), two[:, :0])
    yield "no-visual-token", (*nothing, 500, 0, 0)
    whole = torch.zeros(1, 576, dtype=torch.int64)
    yield "V576", (torch.randn(1, 576), whole, torch.tensor([[576]]), whole + 24, 250, 0, 144)


@op(_cases)
def rows_keep(
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: the best rows of each segment."""
    width = segment.shape[1]
    place, start = ranks(segment, counts), starts(segment, counts)
    member = (segment >= 0) & (place // columns < per_token(counts, segment) // columns)
    head = member & (place % columns == 0)
    # The spot of each token's row is that of its first token; one more column takes the others.
    row = torch.where(member, start + place // columns * columns, width)
    empty = torch.zeros(segment.shape[0], width + 1, device=segment.device)
    total = empty.scatter_add(1, row, torch.where(member, score.float(), 0.0)).gather(1, row)
    first = torch.where(head, segment, -1)
    rank = ranks(first, count_segments(first, counts), total)
    of_row = torch.zeros_like(empty, dtype=torch.int64).scatter(1, torch.where(head, row, width), rank)
    stay = per_token(budgets(counts, permille, count), segment) // columns
    return pack(member & (of_row.gather(1, row) < stay), slots)


@primitive
class Rows(Gridded, Select):
    """Whole rows of the grid stay: those whose tokens have the highest sum of scores."""

    key: ClassVar[str] = "rows"
    shorthand: ClassVar[str | None] = "keep"
    keep: Budget = Field(description="what stays of each scope, rounded down to whole rows")

    @property
    def sure(self) -> bool:
        """Where positions tell how long rows are, budgets are rounded down at run time."""
        return self.columns is not None

    def apply(self, score: torch.Tensor | None, scope: Scope, columns: torch.Tensor | None = None) -> torch.Tensor:
        budget, written = self.keep, self.columns or 1
        slots = budget.slots(scope.segment.shape[1], scope.number) // written * written
        rule = (*budget.numbers, slots)
        return rows_keep.overload(score, scope.segment, scope.counts, self.rows(scope, columns), *rule)

    def kept(self, counts: list[int]) -> list[int]:
        """What stays, or at most stays where positions tell how long rows are."""
        written = self.columns or 1
        return [self.keep.kept(count) // written * written for count in counts]
