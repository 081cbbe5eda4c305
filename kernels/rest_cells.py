"""merge_cells: what was not chosen is averaged by cells of the picture, one token a cell.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64,
         chosen [B, K] int64 (-1 pads), score [B, V] float, columns [B, V] int64 from 1 on, the same within a segment
         -> index [B, K2] int64 ascending, pads (-1) first; feature [B, K2, D] and size [B, K2] like the inputs, pads 0;
            K2 = K + cells * cells * N
Grid:    places 0..columns-1 of a segment are its first row, and so on; the last row may be short.
Rule:    rows and columns fall into `cells` equal parts each: part = place * cells // length. The tokens of a cell that
         were not chosen become their mean weighted by score (by 1 where the scores sum up to 0), at the place of the
         best-scored of them. A cell without any gives no token.
Sizes:   add up. Sums are float32.
Ties:    the lower index wins.   Scores below 0 and NaN have weight 0.
Memory:  O(B V cells^2 N).

Reference: VFlowOpt, arXiv 2508.05211 (recycling of what is pruned). Deviation: the published cells have a side in
patches, so that the last ones are smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field

from tvc.errors import PolicyError
from tvc.kernels.grid import Gridded
from tvc.kernels.op import Rest, Scope, op, primitive
from tvc.kernels.segments import mark, pack, per_token, ranks, rows_at


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    chosen = torch.tensor([[-1, 3, 6], [1, 4, 8], [-1, -1, 5]])
    feature, score = torch.randn(3, 9, 6), torch.rand(3, 9)
    plain = (feature, torch.randint(1, 4, (3, 9)).float(), segment, counts)
    two, three = torch.full_like(segment, 2), torch.full_like(segment, 3)
    for cells in (1, 2, 3):
        yield f"cells{cells}", (*plain, chosen, score, three, cells, 2 * cells * cells)
        yield f"cells{cells}-two-columns", (*plain, chosen, score, two, cells, 2 * cells * cells)
        ragged = torch.where(segment == 1, 3, two)
        yield f"cells{cells}-ragged", (*plain, chosen, score, ragged, cells, 2 * cells * cells)
    yield "no-score", (*plain, chosen, torch.zeros(3, 9), three, 2, 8)
    yield "some-below-zero", (*plain, chosen, score - 0.5, three, 2, 8)
    yield "nan", (*plain, chosen, score.masked_fill(score > 0.6, float("nan")), three, 2, 8)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    yield "none-chosen", (*plain, nothing, score, three, 2, 8)
    yield "every-chosen", (*plain, torch.where(segment < 0, -1, torch.arange(9)), score, three, 2, 8)
    no_token = (feature[:, :0], plain[1][:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*no_token, nothing, score[:, :0], three[:, :0], 2, 8)
    whole = torch.zeros(1, 577, dtype=torch.int64)
    many = (torch.randn(1, 577, 3), torch.ones(1, 577), whole, torch.tensor([[577]]))
    yield "V577", (*many, torch.arange(100, 200)[None], torch.rand(1, 577), whole + 24, 3, 9)


@op(_cases)
def merge_cells(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    columns: torch.Tensor,
    cells: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens and of one token a cell."""
    valid, score = segment >= 0, score.float()
    kept = mark(chosen, segment.shape[1])
    rest = valid & ~kept
    place, height = ranks(segment, counts), (per_token(counts, segment) + columns - 1) // columns
    row, column = place // columns * cells // height.clamp(min=1), place % columns * cells // columns
    number = counts.shape[1] * cells * cells
    cell = torch.where(rest, (segment * cells + row) * cells + column, -1)
    member = cell[:, None, :] == torch.arange(number, device=segment.device)[:, None]  # [B, C, V]

    lowest = torch.finfo(torch.float32).min
    known = torch.where(torch.isnan(score), lowest, score.clamp(min=lowest))
    # The row and the column in front keep V = 0 and N = 0 right in ONNX Runtime; the column wins in empty cells alone.
    table = torch.where(member, known[:, None, :], float("-inf"))
    table = torch.nn.functional.pad(table, (1, 0, 1, 0), value=float("-inf"))
    flags = member.float()
    holds = flags @ rest.float()[:, :, None]  # [B, C, 1] number of members
    target = mark(table.argmax(2)[:, 1:] - 1, segment.shape[1])

    weight = torch.where(rest, known.clamp(min=0), 0.0)
    total = flags @ weight[:, :, None]
    weights = torch.where(total > 0, flags * weight[:, None, :], flags)
    wide, own = torch.where(valid[:, :, None], feature.float(), 0.0), size.float()[:, :, None]
    mean = (weights @ wide) / torch.where(total > 0, total, holds).clamp(min=1e-30)

    result = pack(kept | target, chosen.shape[1] + slots)
    into = torch.where(rows_at(target[:, :, None].float(), result).squeeze(2) > 0, per_token(cell, result), -1)
    folds = (into >= 0)[:, :, None]
    merged = torch.where(folds, rows_at(mean, into), rows_at(wide, result))
    sizes = torch.where(folds, rows_at(flags @ own, into), rows_at(own, result))
    return result, merged.to(feature.dtype), sizes.squeeze(2).to(size.dtype)


@primitive
class Cells(Gridded, Rest):
    """What was not chosen is averaged by cells of the picture."""

    key: ClassVar[str] = "cells"
    shorthand: ClassVar[str | None] = "cells"
    exact: ClassVar[bool] = False
    cells: int = Field(3, gt=0, le=32, description="parts that rows, and columns, fall into")

    @property
    def needs_score(self) -> bool:
        """Always: scores are the weights."""
        return True

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
        columns: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if score is None:
            raise PolicyError(
                "the tokens of a cell are weighted by their score",
                where="rest.cells",
                got="a step without a score",
                want="a score",
                fix="add `score:` to the step, or write rest: {merge: {targets: kept}}",
            )
        tensors = (feature, size, scope.segment, scope.counts, chosen, score, self.rows(scope, columns))
        slots = scope.number * self.cells * self.cells
        merged: tuple[Any, Any, Any] = merge_cells.overload(*tensors, self.cells, slots)
        return merged

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        """The upper bound: a cell whose tokens were all chosen gives none."""
        most = self.cells * self.cells
        return [stays + min(most, n - stays) for n, stays in zip(counts, chosen, strict=True)]
