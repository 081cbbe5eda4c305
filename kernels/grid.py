"""What is beside what in a picture: the token to the right of each visual token, the one below, and how long rows are.

Neighbours are `(right, below)`, each [B, V] int64: a place along V, -1 where the picture (or the frame) ends and for
pads. Where every token is still there, tokens follow each other row by row.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field

from tvc.errors import PolicyError, SiteError
from tvc.kernels.op import Merging, Primitive, Scope, Tap
from tvc.kernels.segments import per_token, ranks

Neighbours = tuple[torch.Tensor, torch.Tensor]


def neighbours_by_position(positions: torch.Tensor, segment: torch.Tensor) -> Neighbours:
    """From where tokens stand: `positions [3, B, V]` on the axes of time, rows and columns; `segment [B, V]`, -1 pads.

    A token's right neighbour is the next one, if it stands in the same row and one column further. A row is a run of
    such tokens, and the token below the one that comes as many places later, if it stands one row further.
    """
    slot = torch.arange(segment.shape[1], device=segment.device).expand(segment.shape)
    right = _stands(positions, segment, torch.ones_like(slot), (0, 0, 1))
    length = _runs(right)
    below = _stands(positions, segment, length, (0, 1, 0))
    return torch.where(right, slot + 1, -1), torch.where(below, slot + length, -1)


def row_lengths(positions: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[B, V] int64: tokens in the row of each token; arguments and rows as of `neighbours_by_position`. Pads get 1."""
    return _runs(_stands(positions, segment, torch.ones_like(segment), (0, 0, 1)))


def _stands(
    positions: torch.Tensor, segment: torch.Tensor, step: torch.Tensor, away: tuple[int, int, int]
) -> torch.Tensor:
    """[B, V] bool: whether the token `step [B, V]` places on is of the same picture, and stands that far away."""
    tokens = segment.shape[1]
    slot = torch.arange(tokens, device=segment.device).expand(segment.shape)
    index = torch.minimum(slot + step, torch.full_like(slot, tokens) - 1)
    time, row, column = (positions.gather(2, index.expand(positions.shape)) - positions).unbind(0)
    inside = (segment >= 0) & (slot + step < tokens) & (segment.gather(1, index) == segment)
    return inside & (time == away[0]) & (row == away[1]) & (column == away[2])


def _runs(right: torch.Tensor) -> torch.Tensor:
    """[B, V] int64: tokens in the run of each token; `right [B, V]` says whether the next one is of the same run."""
    run = (~torch.nn.functional.pad(right, (1, 0))[:, : right.shape[1]]).long().cumsum(1)
    one = torch.ones_like(run)
    return torch.zeros_like(torch.nn.functional.pad(run, (1, 0))).scatter_add(1, run, one).gather(1, run)


def neighbours_by_columns(segment: torch.Tensor, counts: torch.Tensor, columns: int) -> Neighbours:
    """From the length of a row: places 0..columns-1 of a segment are its first row, and so on; the last may be short.

    Args:
        segment: [B, V] int64, -1 pads; a segment's tokens stand side by side.
        counts: [B, N] int64 tokens of each segment.
    """
    slot = torch.arange(segment.shape[1], device=segment.device).expand(segment.shape)
    place, size = ranks(segment, counts), per_token(counts, segment)
    right = (segment >= 0) & (place % columns < columns - 1) & (place + 1 < size)
    below = (segment >= 0) & (place + columns < size)
    return torch.where(right, slot + 1, -1), torch.where(below, slot + columns, -1)


class Gridded(Primitive):
    """A primitive that works on the rows of an image's grid: as long as `columns` says, or the decoder's positions."""

    columns: int | None = Field(
        None, gt=0, description="tokens in a row of the grid; default: those of the model, or what its positions tell"
    )

    def taps(self) -> dict[str, Tap]:
        return {"columns": Tap("row")} if self.columns is None else {}

    def rows(self, scope: Scope, columns: torch.Tensor | None) -> torch.Tensor:
        """[B, V] int64 tokens in the row of each token: `columns` where the tap gives them, else those written."""
        if columns is not None:
            return columns
        if self.columns is None:
            raise PolicyError(
                "the length of a row is not known yet",
                where=f"{self.kind}.{self.key}.columns",
                got="no columns",
                want="tokens in a row of the grid",
                fix="resolve the policy for a model first: tvc.policy.resolve(policy, layout)",
                slug="unresolved-grid",
            )
        return torch.full_like(scope.segment, self.columns)


class WholeGrids(Gridded, Merging):
    """A merge of images that are one grid each, a square one unless the decoder's positions tell its rows."""

    def for_model(self, tokens: int, steps: int, blocks: int) -> Self:
        """The same, if every image is one whole grid."""
        if self.columns is not None and tokens != self.columns**2:
            raise SiteError(
                f"`{self.key}` works on images of one square grid each",
                where=f"merge.{self.key}",
                got=f"{tokens} visual tokens in a scope, and {self.columns} in a row",
                want=f"{self.columns**2} visual tokens, the first reduction of the policy, scope: image",
                fix="act where an image is one grid, or merge by something else",
                slug="no-grid",
            )
        return self
