"""Grid MLP: the mean of every cell of a coarser grid, and a trained gated network behind it.

Cell i of n along an axis of length s covers floor(i s / n) up to ceil((i + 1) s / n), as in PyTorch's adaptive pooling,
so that neighbours may share a row. Behind the mean x comes W_down (silu(W_gate x) * W_up x).

Reference: TokenFLEX, arXiv 2504.03154 (one model for several numbers of tokens). Its code and the widths of its network
are not published. Deviation: it acts on projected features; published, inside the projector.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import LARGEST, Budget
from tvc.kernels.op import Scope, Tap, primitive
from tvc.kernels.segment_pool import GridPooling, by_place
from tvc.kernels.weights import Shape


def cell_logits(columns: int, side: int) -> torch.Tensor:
    """[1, columns^2, side^2] float32: 0 where a token lies in a cell, else the lowest number: a softmax makes means."""
    edges = torch.arange(side)
    first, behind = edges * columns // side, -(-(edges + 1) * columns // side)
    place = torch.arange(columns)[:, None]
    inside = (place >= first) & (place < behind)  # [columns, side]
    both = (inside[:, None, :, None] & inside[None, :, None, :]).reshape(1, columns**2, side**2)
    return torch.where(both, 0.0, torch.finfo(torch.float32).min)


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
        return self.module()

    def shapes(self, width: int | str) -> dict[str, Shape]:
        return {"gate.weight": ("hidden", width), "up.weight": ("hidden", width), "down.weight": (width, "hidden")}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights, and what lies in which cell."""
        return {**super().tensors(), "cells": cell_logits(self.columns or 1, self.side)}

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = by_place(weights["cells"], scope.segment, scope.counts)
        chosen, pooled, sizes = self.pooled(logits, feature, size, scope)
        gate, up, down = (weights[f"{name}.weight"].float().T for name in ("gate", "up", "down"))
        made = (torch.nn.functional.silu(pooled @ gate) * (pooled @ up)) @ down
        return chosen, made.to(feature.dtype), sizes
