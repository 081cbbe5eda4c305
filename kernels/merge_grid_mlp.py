"""Grid MLP: the mean of every cell of a coarser grid, and a trained gated network behind it.

Cells and means are those of `resize` (see merge_resize.py). Behind the mean x comes W_down (silu(W_gate x) * W_up x).

Reference: TokenFLEX, arXiv 2504.03154 (one model for several numbers of tokens). Its code and the widths of its network
are not published. Deviation: it acts on projected features; published, inside the projector.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tvc.kernels.merge_resize import CellPooling, cell_logits
from tvc.kernels.op import Scope, Tap, primitive
from tvc.kernels.weights import Shape, Trained


@primitive
class GridMlp(Trained, CellPooling):
    """The means of the cells of a coarser grid go through a trained gated network, and the tokens themselves leave."""

    key: ClassVar[str] = "grid_mlp"

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
