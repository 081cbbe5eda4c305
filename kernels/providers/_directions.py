"""What tiles of cosines are made of: rows without what has no direction, and the inverse of their lengths."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def directed(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [B, K, d] like `values`, inverse lengths [B, K] float32): the product of both is a direction.

    Rows stay in their own dtype, for tensor cores; what `tvc.kernels.greedy.directions` makes zeros of has both zero.
    """
    length = torch.linalg.vector_norm(values, dim=2, dtype=torch.float32)
    known = length.isfinite()
    inverse = torch.where(known, 1.0 / length.clamp(min=1e-12), 0.0)
    return values.masked_fill(~known[:, :, None], 0.0).contiguous(), inverse
