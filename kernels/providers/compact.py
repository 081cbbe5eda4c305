"""compact on Triton: the place of each slot among all, by counting the slots in front of it, in one launch."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, tl

MOST = 8192  # counting takes S x S comparisons: on an H200 it is half as fast as sorting at 16,384 slots


@jit
def _slots(p_text, p_visual, o_s, T, S):
    """[BLOCK] int32: slots of a tile of cat(text, visual)."""
    b_text = tl.load(p_text + o_s, mask=o_s < T, other=0)
    b_visual = tl.load(p_visual + (o_s - T), mask=(o_s >= T) & (o_s < S), other=0)
    return tl.where(o_s < T, b_text, b_visual).to(tl.int32)


@jit
def _compact_kernel(
    p_text, p_visual, p_kept, p_source, p_text_index, p_visual_index, T, K, BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr
):
    i_s = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    S = T + K
    p_text += i_b * T
    p_visual += i_b * K
    o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    b_slot = _slots(p_text, p_visual, o_s, T, S)  # [BLOCK_S]
    b_place = tl.zeros([BLOCK_S], tl.int32)
    for i_o in range(0, S, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        b_other = _slots(p_text, p_visual, o_o, T, S)  # [BLOCK_O]
        b_same = (b_other[None, :] == b_slot[:, None]) & (o_o[None, :] < o_s[:, None])
        b_before = ((b_other[None, :] < b_slot[:, None]) | b_same) & (o_o < S)[None, :]
        b_place += tl.sum(b_before.to(tl.int32), 1)
    m_s = o_s < S
    tl.store(p_kept + i_b * S + b_place, b_slot.to(tl.int64), mask=m_s)
    tl.store(p_source + i_b * S + b_place, o_s.to(tl.int64), mask=m_s)
    b_moved = tl.where(b_slot < 0, -1, b_place).to(tl.int64)
    tl.store(p_text_index + i_b * T + o_s, b_moved, mask=o_s < T)
    tl.store(p_visual_index + i_b * K + (o_s - T), b_moved, mask=(o_s >= T) & m_s)


def supports(text_index: torch.Tensor, visual_slots: torch.Tensor) -> Support:
    slots = text_index.shape[1] + visual_slots.shape[1]
    return YES if slots <= MOST else no(f"{slots} slots are left; above {MOST} sorting them is faster than counting")


def launch(
    text_index: torch.Tensor, visual_slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kept, source, text_index, visual_index) of the chunk that holds these text and visual slots alone."""
    text_index, visual_slots = text_index.contiguous(), visual_slots.contiguous()
    batch, text = text_index.shape
    slots = text + visual_slots.shape[1]
    kept, source = (torch.empty(batch, slots, dtype=torch.int64, device=text_index.device) for _ in range(2))
    moved = torch.empty_like(text_index), torch.empty_like(visual_slots)
    if kept.numel():
        chosen = setting("compact", slots)
        _compact_kernel[(cdiv(slots, chosen["block"]), batch)](
            text_index, visual_slots, kept, source, *moved, text, slots - text,
            BLOCK_S=chosen["block"], BLOCK_O=chosen["block"], num_warps=chosen["warps"],
        )  # fmt: skip
    return kept, source, *moved
