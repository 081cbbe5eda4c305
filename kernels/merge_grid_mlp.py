"""Grid MLP: the mean of every cell of a coarser grid, and a trained gated network behind it.

Cell i of n along an axis of length s covers floor(i s / n) up to ceil((i + 1) s / n), as in PyTorch's adaptive pooling,
so that neighbours may share a row. Of an image with fewer tokens than there are cells each token is a cell. Behind the
mean x comes W_down (silu(W_gate x) * W_up x).

Reference: TokenFLEX, arXiv 2504.03154 (one model for several numbers of tokens). Its code and the widths of its network
are not published. Deviation: it acts on projected features; published, inside the projector.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import LARGEST, Budget
from tvc.kernels.op import Scope, Tap, primitive
from tvc.kernels.segment_pool import GridPooling
from tvc.kernels.segments import per_token, ranks
from tvc.kernels.weights import Shape


def cell_logits(segment: torch.Tensor, counts: torch.Tensor, columns: torch.Tensor, side: int) -> torch.Tensor:
    """[B, 1, V, side^2] float32: 0 where a token lies in a cell, else the lowest number: a softmax makes means.

    Args:
        segment: [B, V] int64, -1 pads; counts: [B, N] int64; columns: [B, V] int64 tokens in each token's row.
    """
    place, size = ranks(segment, counts), per_token(counts, segment)
    edge = torch.arange(side, device=segment.device)

    def inside(at: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """[B, V, side] bool: which parts of an axis [B, V] tokens long hold the place `at [B, V]`."""
        at, length = at[:, :, None], length[:, :, None]
        return (at >= edge * length // side) & (at < ((edge + 1) * length + side - 1) // side)

    down = inside(place // columns, (size + columns - 1) // columns)
    both = (down[:, :, :, None] & inside(place % columns, columns)[:, :, None, :]).flatten(2)
    itself = place[:, :, None] == torch.arange(side * side, device=segment.device)
    few = (size < side * side)[:, :, None]
    member = (few & itself) | (~few & both)
    return torch.where(member, 0.0, torch.finfo(torch.float32).min)[:, None]


@primitive
class GridMlp(GridPooling):
    """The means of the cells of a coarser grid go through a trained gated network, and the tokens themselves leave."""

    key: ClassVar[str] = "grid_mlp"
    side: int = Field(ge=1, description="rows and columns of the coarser grid")

    @property
    def number(self) -> Budget:
        """One new token a cell."""
        return Budget(count=min(self.side**2, LARGEST))

    def taps(self) -> dict[str, Tap]:
        return {**self.module(), **super().taps()}

    def shapes(self, width: int | str) -> dict[str, Shape]:
        return {"gate.weight": ("hidden", width), "up.weight": ("hidden", width), "down.weight": (width, "hidden")}

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        scope: Scope,
        weights: dict[str, torch.Tensor],
        columns: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = cell_logits(scope.segment, scope.counts, self.rows(scope, columns), self.side)
        chosen, pooled, sizes = self.pooled(logits, feature, size, scope)
        gate, up, down = (weights[f"{name}.weight"].float().T for name in ("gate", "up", "down"))
        made = (torch.nn.functional.silu(pooled @ gate) * (pooled @ up)) @ down
        return chosen, made.to(feature.dtype), sizes
