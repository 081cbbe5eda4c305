"""coverage_keep on Triton: every round in one program a segment, which reads the matrix of coverings once a round."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._greedy import budget, first_best, nothing, store_taken
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import jit, power, tl
from tvc.kernels.select_coverage import coverings

MOST_TOKENS = 1536  # above, one multiprocessor reads the matrix more slowly than the reference's launches do together


@jit
def _coverage_kernel(
    p_cover, p_covered, p_segment, p_counts, p_flag,
    V, N, rows, permille, count, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_cover += i_b * rows * V
    p_covered += (i_b * N + i_n) * rows
    o_v = tl.arange(0, BLOCK_V)
    b_segment = tl.load(p_segment + i_b * V + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
    m_v = b_segment == i_n
    b_free = m_v
    picked = tl.full([], 0, tl.int32)
    for i_k in range(budget(p_counts, i_b, i_n, N, permille, count)):
        # Makes what the round before wrote to `covered` visible.
        tl.debug_barrier()
        b_value = tl.zeros([BLOCK_V], tl.float32)
        for i_r in range(0, rows, BLOCK_R):
            o_r = (i_r + tl.arange(0, BLOCK_R)).to(tl.int64)
            m_r = o_r < rows
            b_covered = tl.zeros([BLOCK_R], tl.float32)
            if i_k > 0:
                b_covered = tl.load(p_cover + o_r * V + picked, mask=m_r, other=0.0)  # [BLOCK_R] by the last taken
                if i_k > 1:
                    b_covered = tl.maximum(b_covered, tl.load(p_covered + o_r, mask=m_r, other=0.0))
                tl.store(p_covered + o_r, b_covered, mask=m_r)
            p_tile = p_cover + o_r[:, None] * V + o_v[None, :]
            b_cover = tl.load(p_tile, mask=m_r[:, None] & m_v[None, :], other=0.0)  # [BLOCK_R, BLOCK_V]
            b_value += tl.sum(tl.maximum(b_cover - b_covered[:, None], 0.0), 0)
        picked = first_best(b_value, b_free, o_v, 0.0, BLOCK_V)
        b_free = b_free & (o_v != picked)
    store_taken(p_flag + i_b * V, b_segment, b_free, o_v, i_n, V, N)


def supports(
    feature: torch.Tensor,
    text: torch.Tensor,
    valid: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    text_temperature: float,
    visual_temperature: float,
    visual: float,
    permille: int,
    count: int,
    slots: int,
) -> Support:
    if segment.shape[1] > MOST_TOKENS:
        return no(f"there are {segment.shape[1]} visual tokens; one program is fast up to {MOST_TOKENS}")
    return YES


def launch(
    feature: torch.Tensor,
    text: torch.Tensor,
    valid: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    text_temperature: float,
    visual_temperature: float,
    visual: float,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that together stand for the text and the segment."""
    batch, tokens = segment.shape
    if tokens == 0 or counts.shape[1] == 0:
        return nothing(segment, slots)
    cover = coverings(feature, text, valid, segment, counts, text_temperature, visual_temperature, visual)
    segment, counts = segment.contiguous(), counts.contiguous()
    rows, number = cover.shape[1], counts.shape[1]
    covered = torch.empty(batch, number, rows, dtype=torch.float32, device=cover.device)
    flag = torch.empty(batch, tokens, dtype=torch.int8, device=cover.device)
    block = max(16, power(tokens))
    _coverage_kernel[(number, batch)](
        cover, covered, segment, counts, flag, tokens, number, rows, permille, count,
        BLOCK_V=block, BLOCK_R=max(1, min(16, 8192 // block)), num_warps=setting("coverage_keep", tokens)["warps"],
    )  # fmt: skip
    return packed(flag, slots)
