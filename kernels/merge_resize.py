"""Resize: an image's grid becomes one of `side` x `side` tokens, by the means of its cells or between neighbours.

Cells:   cell i of n along an axis of length s covers floor(i s / n) up to ceil((i + 1) s / n), as in PyTorch's adaptive
         pooling, so that neighbours may share a row. Each token of the new grid is the mean of one.
Between: the middle of cell i lies at (i + 1/2) s / n - 1/2 along the axis, but not in front of the first token; the new
         token is a mean of the two tokens beside it, weighted by how near they are, along both axes: PyTorch's bilinear
         interpolation with `align_corners=False`.
Few:     of an image with fewer tokens than the new grid has each token stays.

Reference: the poolings of TokenFLEX and LangDC (cells) and of CrossLMM (bilinear), without what is trained behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.budget import LARGEST, Budget
from tvc.kernels.op import Scope, primitive
from tvc.kernels.segment_pool import GridPooling
from tvc.kernels.segments import per_token, ranks


class CellPooling(GridPooling):
    """A pooling into a grid of fewer rows and columns."""

    side: int = Field(ge=1, description="rows and columns of the coarser grid")

    @property
    def number(self) -> Budget:
        """One new token a cell."""
        return Budget(count=min(self.side**2, LARGEST))


def cell_logits(segment: torch.Tensor, counts: torch.Tensor, columns: torch.Tensor, side: int) -> torch.Tensor:
    """[B, 1, V, side^2] float32: 0 where a token lies in a cell, else the lowest number: a softmax makes means.

    Args:
        segment: [B, V] int64, -1 pads; counts: [B, N] int64; columns: [B, V] int64 tokens in each token's row.
    """
    edge = torch.arange(side, device=segment.device)

    def inside(at: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return ((at >= edge * length // side) & (at < ((edge + 1) * length + side - 1) // side)).float()

    return _logits(segment, counts, columns, side, inside)


def near_logits(segment: torch.Tensor, counts: torch.Tensor, columns: torch.Tensor, side: int) -> torch.Tensor:
    """[B, 1, V, side^2] float32: logarithms of weights between neighbours; arguments as of `cell_logits`."""
    middle = (torch.arange(side, device=segment.device) * 2 + 1).float() / (2 * side)

    def near(at: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        place = (middle * length - 0.5).clamp(min=0.0).minimum(length - 1.0)
        return (1 - (place - at).abs()).clamp(min=0.0)

    return _logits(segment, counts, columns, side, near)


def _logits(
    segment: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    side: int,
    weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`weight` of (place, length of the axis), each [B, V, 1], gives [B, V, side]: what its parts take of it."""
    place, size = ranks(segment, counts), per_token(counts, segment)
    down = weight((place // columns)[:, :, None], ((size + columns - 1) // columns)[:, :, None])
    across = weight((place % columns)[:, :, None], columns[:, :, None])
    both = (down[:, :, :, None] * across[:, :, None, :]).flatten(2)
    itself = (place[:, :, None] == torch.arange(side * side, device=segment.device)).float()
    share = torch.where((size < side * side)[:, :, None], itself, both)
    lowest = torch.finfo(torch.float32).min
    return torch.where(share > 0, share.clamp(min=1e-30).log(), lowest)[:, None]


@primitive
class Resize(CellPooling):
    """Every image's grid becomes a coarser one, of the means of its cells or of what lies between its tokens."""

    key: ClassVar[str] = "resize"
    how: Literal["mean", "bilinear"] = Field("mean", description="means of cells, or weighted means of neighbours")

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, columns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = {"mean": cell_logits, "bilinear": near_logits}[self.how]
        weights = logits(scope.segment, scope.counts, self.rows(scope, columns), self.side)
        chosen, pooled, sizes = self.pooled(weights, feature, size, scope)
        return chosen, pooled.to(feature.dtype), sizes
