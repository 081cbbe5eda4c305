"""threshold_keep on Triton: one program a segment finds its highest score and flags what passes."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._directions import FLOATS
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import jit, tl
from tvc.kernels.select_threshold import largest


@jit
def _passes_kernel(
    p_score, p_segment, p_flag, V, threshold, below_zero, RELATIVE: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """`below_zero`: what a highest score below zero is multiplied by, where others are by `threshold`."""
    i_n = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_block = tl.arange(0, BLOCK_V)
    limit = threshold
    if RELATIVE:
        b_best = tl.full([BLOCK_V], float("-inf"), tl.float32)
        for i_v in range(0, V, BLOCK_V):
            o_v = i_v + o_block
            m_v = tl.load(p_segment + i_b * V + o_v, mask=o_v < V, other=-1) == i_n
            b_score = tl.load(p_score + i_b * V + o_v, mask=m_v, other=float("-inf")).to(tl.float32)  # [BLOCK_V]
            b_best = tl.maximum(b_best, tl.where(b_score == b_score, b_score, float("-inf")))
        best = tl.max(b_best, 0)
        limit = best * tl.where(best < 0, below_zero, threshold)
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + o_block
        b_segment = tl.load(p_segment + i_b * V + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
        b_score = tl.load(p_score + i_b * V + o_v, mask=o_v < V, other=float("nan")).to(tl.float32)  # [BLOCK_V]
        # No comparison holds for NaN.
        m_passes = b_score >= limit if RELATIVE else b_score > limit
        b_flag = (m_passes & (b_segment == i_n)).to(tl.int8)
        # What is of no segment has a writer too: the first program.
        b_owner = tl.where(b_segment < 0, 0, b_segment)
        tl.store(p_flag + i_b * V + o_v, b_flag, mask=(b_owner == i_n) & (o_v < V))


def supports(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, threshold: float, relative: bool
) -> Support:
    if score.dtype not in FLOATS:
        return no(f"scores are {score.dtype}, not float32, float16 or bfloat16")
    return YES


def launch(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, threshold: float, relative: bool
) -> torch.Tensor:
    """[B, K] int64: the tokens that pass; K is the largest number of a sample."""
    batch, visual = segment.shape
    if visual == 0 or counts.shape[1] == 0:
        return torch.empty(batch, 0, dtype=torch.int64, device=segment.device)
    flag = torch.empty(batch, visual, dtype=torch.int8, device=segment.device)
    chosen = setting("threshold_keep", visual)
    _passes_kernel[(counts.shape[1], batch)](
        score.contiguous(), segment.contiguous(), flag, visual, threshold, 2.0 - threshold,
        RELATIVE=relative, BLOCK_V=chosen["block"], num_warps=chosen["warps"],
    )  # fmt: skip
    return packed(flag, largest(flag > 0))
