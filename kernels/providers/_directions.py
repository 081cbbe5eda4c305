"""What tiles of cosines are made of: rows without what has no direction, and the inverse of their lengths."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def inverse_lengths(values: torch.Tensor) -> torch.Tensor:
    """[B, K] float32: what makes rows of `values [B, K, d]` directions; 0 where `directions` makes zeros of one."""
    length = torch.linalg.vector_norm(values, dim=2, dtype=torch.float32)
    return torch.where(length.isfinite(), 1.0 / length.clamp(min=1e-12), 0.0)


def directed(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [B, K, d] like `values`, inverse lengths [B, K] float32): the product of both is a direction.

    Rows stay in their own dtype, for tensor cores, with zeros for what has no direction.
    """
    inverse = inverse_lengths(values)
    return values.masked_fill((inverse == 0)[:, :, None], 0.0).contiguous(), inverse
