"""shorten on Triton: one launch finds the place of each slot, one takes everything along that crosses the cut."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, power, tl
from tvc.kernels.segments import follow
from tvc.kernels.shorten import Shortened

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MOST = 8192  # counting takes S x S comparisons: on an H200 it is half as fast as sorting at 16,384 slots


@jit
def _slots(p_text, p_visual, p_chosen, o_s, T, S):
    """[BLOCK] int32: slots of a tile of cat(text, chosen visual tokens)."""
    b_text = tl.load(p_text + o_s, mask=o_s < T, other=-1)
    b_chosen = tl.load(p_chosen + (o_s - T), mask=(o_s >= T) & (o_s < S), other=-1)
    b_visual = tl.load(p_visual + b_chosen, mask=b_chosen >= 0, other=-1)
    return tl.where(o_s < T, b_text, b_visual).to(tl.int32)


@jit
def _places_kernel(
    p_text, p_visual, p_chosen, p_kept, p_source, p_text_index, p_visual_index, T, V, K,
    BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Where each slot stands among all, by counting the slots in front of it."""
    i_s = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    S = T + K
    p_text += i_b * T
    p_visual += i_b * V
    p_chosen += i_b * K
    o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    b_slot = _slots(p_text, p_visual, p_chosen, o_s, T, S)  # [BLOCK_S]
    b_place = tl.zeros([BLOCK_S], tl.int32)
    for i_o in range(0, S, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        b_other = _slots(p_text, p_visual, p_chosen, o_o, T, S)  # [BLOCK_O]
        b_same = (b_other[None, :] == b_slot[:, None]) & (o_o[None, :] < o_s[:, None])
        b_before = ((b_other[None, :] < b_slot[:, None]) | b_same) & (o_o < S)[None, :]
        b_place += tl.sum(b_before.to(tl.int32), 1)
    m_s = o_s < S
    tl.store(p_kept + i_b * S + b_place, b_slot.to(tl.int64), mask=m_s)
    tl.store(p_source + i_b * S + b_place, o_s.to(tl.int64), mask=m_s)
    b_moved = tl.where(b_slot < 0, -1, b_place).to(tl.int64)
    tl.store(p_text_index + i_b * T + o_s, b_moved, mask=o_s < T)
    tl.store(p_visual_index + i_b * K + (o_s - T), b_moved, mask=(o_s >= T) & m_s)


@jit
def _along_kernel(
    p_chosen, p_residual, p_merged, p_ids, p_query, p_segment, p_origin, p_kept, p_source,
    p_rows, p_ids_after, p_query_after, p_segment_after, p_origin_after, p_counts,
    B, S, T, V, K, N, D, s_b, s_s,
    AXES: tl.constexpr, MERGED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of the residual stream by stretches of channels; the last stretch takes what is one number a token."""
    i_s, i_d = tl.program_id(0), tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    R = T + K
    o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = o_s < R
    b_kept = tl.load(p_kept + i_b * R + o_s, mask=m_s, other=-1)  # [BLOCK_S] int64
    b_slot = tl.maximum(b_kept, 0)
    if i_d < tl.num_programs(1) - 1:
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        m_tile = m_s[:, None] & (o_d < D)[None, :]
        b_row = tl.load(p_residual + i_b * s_b + b_slot[:, None] * s_s + o_d[None, :], mask=m_tile, other=0.0)
        if MERGED:
            b_source = tl.load(p_source + i_b * R + o_s, mask=m_s, other=0)
            b_number = tl.where(b_kept < 0, -1, b_source - T)  # [BLOCK_S] of a merged row; negative: none
            p_tile = p_merged + (i_b * K + tl.maximum(b_number, 0))[:, None] * D + o_d[None, :]
            b_other = tl.load(p_tile, mask=m_tile & (b_number >= 0)[:, None], other=0.0)
            b_row = tl.where((b_number >= 0)[:, None], b_other.to(b_row.dtype), b_row)
        tl.store(p_rows + (i_b * R + o_s)[:, None] * D + o_d[None, :], b_row, mask=m_tile)
    else:
        b_query = tl.load(p_query + i_b * S + b_slot, mask=m_s, other=-1)
        tl.store(p_query_after + i_b * R + o_s, tl.where(b_kept < 0, -1, b_query), mask=m_s)
        for i_a in range(AXES):
            b_id = tl.load(p_ids + (i_a * B + i_b) * S + b_slot, mask=m_s, other=0)
            tl.store(p_ids_after + (i_a * B + i_b) * R + o_s, b_id, mask=m_s)
        b_token = tl.load(p_chosen + i_b * K + o_s, mask=o_s < K, other=-1)
        b_segment = tl.load(p_segment + i_b * V + b_token, mask=b_token >= 0, other=-1)
        tl.store(p_segment_after + i_b * K + o_s, b_segment, mask=o_s < K)
        b_origin = tl.load(p_origin + i_b * V + b_token, mask=b_token >= 0, other=-1)
        tl.store(p_origin_after + i_b * K + o_s, b_origin, mask=o_s < K)
        # Segments may be more than rows are: programs take them in turns.
        for i_n in range(i_s * BLOCK_S, N, tl.num_programs(0) * BLOCK_S):
            o_n = i_n + tl.arange(0, BLOCK_S)
            b_count = tl.zeros([BLOCK_S], tl.int64)
            for i_k in range(0, K, BLOCK_K):
                o_k = i_k + tl.arange(0, BLOCK_K)
                b_member = tl.load(p_chosen + i_b * K + o_k, mask=o_k < K, other=-1)
                b_scope = tl.load(p_segment + i_b * V + b_member, mask=b_member >= 0, other=-1)
                b_count += tl.sum((b_scope[None, :] == o_n[:, None]).to(tl.int64), 1)
            tl.store(p_counts + i_b * N + o_n, b_count, mask=o_n < N)


def supports(
    chosen: torch.Tensor,
    residual: torch.Tensor,
    merged: torch.Tensor | None,
    position_ids: torch.Tensor,
    query_positions: torch.Tensor,
    text_index: torch.Tensor,
    visual_index: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    origin: torch.Tensor,
) -> Support:
    if residual.dtype not in FLOATS:
        return no(f"the residual stream is {residual.dtype}, not float32, float16 or bfloat16")
    return YES


def launch(
    chosen: torch.Tensor,
    residual: torch.Tensor,
    merged: torch.Tensor | None,
    position_ids: torch.Tensor,
    query_positions: torch.Tensor,
    text_index: torch.Tensor,
    visual_index: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    origin: torch.Tensor,
) -> Shortened:
    """The chunk that holds its text and the chosen visual tokens alone, and which slots these were."""
    residual = residual if residual.stride(2) == 1 else residual.contiguous()
    merged = merged if merged is None else merged.contiguous()
    chosen, ids, query, text_index, visual_index, segment, origin = (
        value.contiguous()
        for value in (chosen, position_ids, query_positions, text_index, visual_index, segment, origin)
    )
    batch, slots, width = residual.shape
    text, stay, visual, number = text_index.shape[1], chosen.shape[1], visual_index.shape[1], counts.shape[1]
    left = text + stay
    axes = ids.shape[0] if ids.dim() == 3 else 1
    kept, source, text_after, visual_after = _places(text_index, visual_index, chosen)
    rows = residual.new_empty(batch, left, width)
    ids_after = ids.new_empty(*ids.shape[:-1], left)
    query_after = query.new_empty(batch, left)
    segment_after, origin_after = (segment.new_empty(batch, stay) for _ in range(2))
    counts_after = segment.new_empty(batch, number)
    setup = setting("shorten.along", width)
    block_s, block_d = setup["block_s"], min(setup["block_d"], power(width))
    _along_kernel[(max(1, cdiv(left, block_s)), cdiv(width, block_d) + 1, batch)](
        chosen, residual, residual if merged is None else merged, ids, query, segment, origin, kept, source,
        rows, ids_after, query_after, segment_after, origin_after, counts_after,
        batch, slots, text, visual, stay, number, width, *residual.stride()[:2],
        AXES=axes, MERGED=merged is not None, BLOCK_S=block_s, BLOCK_D=block_d, BLOCK_K=128, num_warps=setup["warps"],
    )  # fmt: skip
    return rows, ids_after, query_after, text_after, visual_after, segment_after, counts_after, origin_after, kept


def _places(
    text_index: torch.Tensor, visual_index: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kept [B, S'], column of each among cat(text, chosen), text_index [B, T], visual_index [B, K]) of what stays."""
    batch, text = text_index.shape
    left = text + chosen.shape[1]
    if left > MOST:
        slots = torch.cat([text_index, follow(visual_index, chosen)], dim=1)
        kept, source = torch.sort(slots, dim=1, stable=True)
        place = torch.arange(left, device=slots.device).expand(batch, -1)
        moved = torch.where(slots < 0, -1, torch.empty_like(source).scatter_(1, source, place))
        return kept, source, moved[:, :text].contiguous(), moved[:, text:].contiguous()
    kept, source = (chosen.new_empty(batch, left) for _ in range(2))
    text_after, visual_after = text_index.new_empty(batch, text), chosen.new_empty(batch, left - text)
    if kept.numel():
        setup = setting("shorten.places", left)
        _places_kernel[(cdiv(left, setup["block"]), batch)](
            text_index, visual_index, chosen, kept, source, text_after, visual_after,
            text, visual_index.shape[1], left - text,
            BLOCK_S=setup["block"], BLOCK_O=setup["block"], num_warps=setup["warps"],
        )  # fmt: skip
    return kept, source, text_after, visual_after
