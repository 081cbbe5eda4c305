"""window_merge on Triton: one program a window asks how alike it is, one a row of the result adds its window up."""

from __future__ import annotations

import torch

from tvc.kernels.merge_windows import grid_windows
from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._directions import FLOATS, inverse_lengths
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, power, tl
from tvc.kernels.segments import per_token
from tvc.kernels.select_threshold import largest


@jit
def _members(p_order, corner, i_m, columns, SIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(tokens [BLOCK_M] int64, whether there are that many) of the window whose first token has the spot `corner`."""
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < SIDE * SIDE
    spot = corner + o_m // SIDE * columns + o_m % SIDE
    return tl.load(p_order + spot, mask=m_m, other=0), m_m


@jit
def _alike_kernel(
    p_feature, p_inverse, p_order, p_window, p_columns, p_alike,
    V, D, s_b, s_v, SIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean cosine of the pairs of the window that starts at each spot; 0 where none does."""
    i_s = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_feature += i_b * s_b
    p_order += i_b * V
    first = tl.load(p_order + i_s)
    columns = tl.load(p_columns + i_b * V + first)
    starts = tl.load(p_window + i_b * V + first) == i_s + 1
    pairs = tl.full([], 0.0, tl.float32)
    for i_d in range(0, tl.where(starts, D, 0), BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_total = tl.zeros([BLOCK_D], tl.float32)
        b_own = tl.zeros([BLOCK_D], tl.float32)
        for i_m in range(0, SIDE * SIDE, BLOCK_M):
            b_token, m_m = _members(p_order, i_s, i_m, columns, SIDE, BLOCK_M)
            b_scale = tl.load(p_inverse + i_b * V + b_token)[:, None]
            p_x = p_feature + b_token[:, None] * s_v + o_d[None, :]
            b_x = tl.load(p_x, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
            b_x = tl.where(b_scale > 0, b_x * b_scale, 0.0)
            b_total += tl.sum(b_x, 0)
            b_own += tl.sum(b_x * b_x, 0)
        pairs += tl.sum(b_total * b_total - b_own, 0)
    tl.store(p_alike + i_b * V + i_s, pairs / tl.maximum(1, SIDE * SIDE * (SIDE * SIDE - 1)))


@jit
def _window_kernel(
    p_feature, p_size, p_order, p_index, p_corner, p_columns, p_merged, p_sizes,
    V, K, D, s_b, s_v, SIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A token, or the mean by size of the window that starts at its corner, where it has one."""
    i_k, i_d = tl.program_id(0), tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    p_feature += i_b * s_b
    p_size += i_b * V
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(p_index + i_b * K + i_k)
    corner = tl.load(p_corner + i_b * K + i_k)
    width = tl.where(token >= 0, D, 0)
    b_merged = tl.load(p_feature + token * s_v + o_d, mask=o_d < width, other=0.0).to(tl.float32)
    size = tl.load(p_size + token, mask=token >= 0, other=0.0).to(tl.float32)
    if corner >= 0:
        columns = tl.load(p_columns + i_b * V + token)
        b_sum = tl.zeros([BLOCK_D], tl.float32)
        b_sizes = tl.zeros([BLOCK_M], tl.float32)
        for i_m in range(0, SIDE * SIDE, BLOCK_M):
            b_token, m_m = _members(p_order + i_b * V, corner, i_m, columns, SIDE, BLOCK_M)
            b_size = tl.load(p_size + b_token).to(tl.float32)
            b_size = tl.where(m_m, b_size, 0.0)  # [BLOCK_M]
            p_x = p_feature + b_token[:, None] * s_v + o_d[None, :]
            b_x = tl.load(p_x, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
            b_sum += tl.sum(b_x * b_size[:, None], 0)
            b_sizes += b_size
        size = tl.sum(b_sizes, 0)
        b_merged = b_sum / tl.maximum(size, 1e-12)
    tl.store(p_merged + (i_b * K + i_k) * D + o_d, b_merged.to(p_merged.dtype.element_ty), mask=o_d < D)
    tl.store(p_sizes + i_b * K + i_k, size.to(p_sizes.dtype.element_ty), mask=i_d == 0)


def supports(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    side: int,
    above: float,
) -> Support:
    if any(value.dtype not in FLOATS for value in (feature, size)):
        return no(f"feature and size are {feature.dtype} and {size.dtype}, not float32, float16 or bfloat16")
    return YES


def launch(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    side: int,
    above: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the windows that merged and of the tokens that did not."""
    batch, visual, width = feature.shape
    if visual == 0:
        index = torch.empty(batch, 0, dtype=torch.int64, device=segment.device)
        return index, feature.new_empty(batch, 0, width), size.new_empty(batch, 0)
    feature = feature if feature.stride(2) == 1 else feature.contiguous()
    segment, size, columns = segment.contiguous(), size.contiguous(), columns.contiguous()
    window, middle = grid_windows(segment, counts, columns, side)
    order = torch.sort(segment, dim=1, stable=True).indices  # the token at each spot
    chosen = setting("window_merge", visual)
    block_m = min(8, power(side * side))
    blocks = {"SIDE": side, "BLOCK_M": block_m, "BLOCK_D": chosen["block_d"], "num_warps": chosen["warps"]}
    alike = torch.empty(batch, visual, dtype=torch.float32, device=segment.device)
    _alike_kernel[(visual, batch)](
        feature, inverse_lengths(feature), order, window, columns, alike, visual, width, *feature.stride()[:2], **blocks
    )
    joins = (window > 0) & (per_token(alike, window - 1) >= above)
    stays = (segment >= 0) & (~joins | middle)
    index = packed(stays.to(torch.int8), largest(stays))
    slots = index.shape[1]
    # The spot of the first token of the window that a row of the result stands for.
    corner = torch.where(index < 0, -1, per_token(torch.where(joins, window - 1, -1), index))
    merged, sizes = feature.new_empty(batch, slots, width), size.new_empty(batch, slots)
    if merged.numel():
        _window_kernel[(slots, cdiv(width, chosen["block_d"]), batch)](
            feature, size, order, index, corner, columns, merged, sizes, visual, slots, width, *feature.stride()[:2],
            **blocks,
        )  # fmt: skip
    return index, merged, sizes
