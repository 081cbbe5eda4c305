"""Flags turned into ascending indices, pads (-1) first: what `tvc.kernels.segments.pack` means, in one launch."""

from __future__ import annotations

import torch

from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, tl


@jit
def _pack_kernel(p_flag, p_index, V, slots, BLOCK_V: tl.constexpr):
    i_v = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_flag += i_b * V
    p_index += i_b * slots
    o_block = tl.arange(0, BLOCK_V)
    # Every program counts all flags of its sample: reading a byte a token again is cheaper than a launch between.
    b_before = tl.zeros([BLOCK_V], tl.int32)
    b_after = tl.zeros([BLOCK_V], tl.int32)
    for i_tile in range(tl.cdiv(V, BLOCK_V)):
        o_v = i_tile * BLOCK_V + o_block
        b_flag = tl.load(p_flag + o_v, mask=o_v < V, other=0).to(tl.int32)  # [BLOCK_V]
        b_before += tl.where(i_tile < i_v, b_flag, 0)
        b_after += tl.where(i_tile < i_v, 0, b_flag)
    before = tl.sum(b_before, 0)
    pads = slots - before - tl.sum(b_after, 0)

    o_v = i_v * BLOCK_V + o_block
    b_flag = tl.load(p_flag + o_v, mask=o_v < V, other=0).to(tl.int32)  # [BLOCK_V]
    o_slot = pads + before + tl.cumsum(b_flag, 0) - 1
    tl.store(p_index + o_slot, o_v.to(tl.int64), mask=(b_flag > 0) & (o_slot >= 0) & (o_slot < slots))
    for i_slot in range(i_v * BLOCK_V, pads, tl.num_programs(0) * BLOCK_V):
        o_slot = i_slot + o_block
        tl.store(p_index + o_slot, tl.full([BLOCK_V], -1, tl.int64), mask=o_slot < pads)


def packed(flag: torch.Tensor, slots: int) -> torch.Tensor:
    """[B, slots] int64: where `flag [B, V]` int8 (contiguous, 0 or 1) is set; no sample has more than fit."""
    batch, visual = flag.shape
    index = torch.empty(batch, slots, dtype=torch.int64, device=flag.device)
    if index.numel():
        chosen = setting("pack", visual)
        grid = (max(1, cdiv(visual, chosen["block"])), batch)
        _pack_kernel[grid](flag, index, visual, slots, BLOCK_V=chosen["block"], num_warps=chosen["warps"])
    return index
