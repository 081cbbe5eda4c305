"""attend_score on Triton: the kernels of attention_score, which compare positions instead of reading a mask."""

from __future__ import annotations

import torch

from tvc.kernels.providers import Support
from tvc.kernels.providers import attention_score as by_mask


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str,
    softcap: float = 0.0,
) -> Support:
    return by_mask.supports(query, key, None, rows, columns, scale, heads, softcap)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: the attention that `rows` pay to `columns` among the keys that are not behind them."""
    return by_mask.scored(query, key, None, (query_positions, key_positions), rows, columns, scale, heads)
