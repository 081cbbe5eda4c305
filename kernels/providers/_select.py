"""The best-scored tokens of each segment as flags: a threshold for each segment by radix selection.

One program a segment and sample finds the highest threshold that as many scores reach as stay, two bits of the ordered
score at a time, and among those equal to it counts from the lowest index. Scores are equal exactly where a stable sort
by descending score, NaN as -inf, takes them to be.
"""

from __future__ import annotations

import torch

from tvc.kernels.providers._budget import stays
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import jit, ordered, tl

MOST_TOKENS = (1 << 20) - 1  # what a count has room for


@jit
def _load(p_score, p_segment, o_v, V, i_n):
    """(key, segment) of a tile: int32 [BLOCK_V] in the order of the scores, the lowest outside the segment."""
    b_segment = tl.load(p_segment + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
    b_inside = b_segment == i_n
    b_key = ordered(tl.load(p_score + o_v, mask=b_inside, other=0.0))  # [BLOCK_V]
    return tl.where(b_inside, b_key, -2147483648), b_segment


@jit
def _best_kernel(
    p_score, p_segment, p_counts, p_flag, V, N, permille, count, BLOCK_V: tl.constexpr, WHOLE: tl.constexpr
):
    i_n = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_score += i_b * V
    p_segment += i_b * V
    p_flag += i_b * V
    tokens = tl.load(p_counts + i_b * N + i_n)
    stay = stays(tokens, permille, count)

    o_block = tl.arange(0, BLOCK_V)
    if WHOLE:
        b_key, b_segment = _load(p_score, p_segment, o_block, V, i_n)
    # The threshold as an unsigned number, without its last bits; int64, so that nothing wraps.
    base = tl.full([], 0, tl.int64)
    for i_pass in range(16):
        step = (tl.full([], 1 << 30, tl.int64)) >> (2 * i_pass)
        one = (base + step - 2147483648).to(tl.int32)
        two = (base + 2 * step - 2147483648).to(tl.int32)
        three = (base + 3 * step - 2147483648).to(tl.int32)
        # Three counts below 2^20 in one number: one reduction a pass.
        b_count = tl.full([BLOCK_V], 0, tl.int64)
        for i_v in range(0, V, BLOCK_V):
            if not WHOLE:
                b_key, b_segment = _load(p_score, p_segment, i_v + o_block, V, i_n)
            b_count += (b_key >= one).to(tl.int64)
            b_count += (b_key >= two).to(tl.int64) << 20
            b_count += (b_key >= three).to(tl.int64) << 40
        counted = tl.sum(b_count, 0)
        reached = ((counted & 1048575) >= stay).to(tl.int64)
        reached += (((counted >> 20) & 1048575) >= stay).to(tl.int64)
        reached += ((counted >> 40) >= stay).to(tl.int64)
        base += reached * step
    threshold = (base - 2147483648).to(tl.int32)

    b_above = tl.full([BLOCK_V], 0, tl.int32)
    for i_v in range(0, V, BLOCK_V):
        if not WHOLE:
            b_key, b_segment = _load(p_score, p_segment, i_v + o_block, V, i_n)
        b_above += (b_key > threshold).to(tl.int32)
    equals = stay - tl.sum(b_above, 0)
    for i_v in range(0, V, BLOCK_V):
        if not WHOLE:
            b_key, b_segment = _load(p_score, p_segment, i_v + o_block, V, i_n)
        b_equal = (b_key == threshold).to(tl.int32)
        b_stays = (b_key > threshold) | ((b_equal > 0) & (tl.cumsum(b_equal, 0) <= equals))
        equals -= tl.sum(b_equal, 0)
        b_stays = b_stays & (b_segment == i_n)
        # What is of no segment has a writer too: the first program.
        b_owner = tl.where((b_segment < 0) | (b_segment >= N), 0, b_segment)
        m_own = (b_owner == i_n) & (i_v + o_block < V)
        tl.store(p_flag + i_v + o_block, b_stays.to(tl.int8), mask=m_own)


def best(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int = 1000, count: int = 0
) -> torch.Tensor:
    """[B, V] int8: 1 for the best-scored tokens of each segment, pads 0.

    Args:
        score: [B, V] float; segment: [B, V] int64, -1 pads.
        counts: [B, N] int64, N > 0: tokens of each segment; with the default budget, how many of them to take.
        permille, count: the budget, as `tvc.kernels.segments.budgets` reads it.
    """
    batch, visual = segment.shape
    flag = torch.empty(segment.shape, dtype=torch.int8, device=segment.device)
    if flag.numel():
        score, segment, counts = score.contiguous(), segment.contiguous(), counts.contiguous()
        chosen = setting("top_keep", visual)
        block = chosen["block"]
        _best_kernel[(counts.shape[1], batch)](
            score, segment, counts, flag, visual, counts.shape[1], permille, count,
            BLOCK_V=block, WHOLE=visual <= block, num_warps=chosen["warps"],
        )  # fmt: skip
    return flag
