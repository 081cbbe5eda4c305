"""top_keep on Triton: the best of each segment by radix selection, then flags turned into indices."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._select import MOST_TOKENS, best


def supports(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int
) -> Support:
    if score.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return no(f"scores are {score.dtype}, not float32, float16 or bfloat16")
    if score.shape[1] > MOST_TOKENS:
        return no(f"there are {score.shape[1]} visual tokens; counts have room for {MOST_TOKENS}")
    return YES


def launch(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int
) -> torch.Tensor:
    """[B, slots] int64: the best of each segment."""
    if segment.shape[1] == 0 or counts.shape[1] == 0:
        return torch.full((segment.shape[0], slots), -1, dtype=torch.int64, device=segment.device)
    return packed(best(score, segment, counts, permille, count), slots)
