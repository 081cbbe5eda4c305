"""Tokens gathered and merged: each row of the result is a token, alone or joined with those that go to its place.

One program a row and stretch of channels walks over the destinations of all tokens and reads the rows of those that
come to its own, so that every feature is read once, and sums are float32 in the order of the tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, tl

Reduce = Literal["mean", "target_mean", "weighted"]


@jit
def _merge_kernel(
    p_feature, p_size, p_weight, p_index, p_to, p_merged, p_sizes,
    V, K, D, s_b, s_v,
    REDUCE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_k, i_d = tl.program_id(0), tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    p_feature += i_b * s_b
    p_size += i_b * V
    p_weight += i_b * V
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    token = tl.load(p_index + i_b * K + i_k)
    real = token >= 0
    b_own = tl.load(p_feature + token * s_v + o_d, mask=o_d < tl.where(real, D, 0), other=0.0)  # [BLOCK_D]
    b_own = b_own.to(tl.float32)
    own_size = tl.load(p_size + token, mask=real, other=0.0).to(tl.float32)
    own_weight = tl.load(p_weight + token, mask=real, other=0.0).to(tl.float32)

    b_added = tl.zeros([BLOCK_D], tl.float32)
    b_weight = tl.zeros([BLOCK_V], tl.float32)
    b_gained = tl.zeros([BLOCK_V], tl.float32)
    joined = tl.full([], 0, tl.int32)
    for i_v in range(0, V, BLOCK_V):
        o_v = (i_v + tl.arange(0, BLOCK_V)).to(tl.int64)
        m_v = tl.load(p_to + i_b * V + o_v, mask=o_v < V, other=-1) == i_k  # [BLOCK_V]
        members = tl.sum(m_v.to(tl.int32), 0)
        if members > 0:
            joined += members
            p_x = p_feature + o_v[:, None] * s_v + o_d[None, :]
            b_x = tl.load(p_x, mask=m_v[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BLOCK_V, BLOCK_D]
            if REDUCE == "weighted":
                b_w = tl.load(p_weight + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BLOCK_V]
                b_x = b_x * b_w[:, None]
                b_weight += b_w
            b_added += tl.sum(b_x, 0)
            b_gained += tl.load(p_size + o_v, mask=m_v, other=0.0).to(tl.float32)
    if REDUCE == "weighted":
        weight = own_weight + tl.sum(b_weight, 0)
        b_merged = (b_own * own_weight + b_added) / tl.maximum(weight, 1e-30)
    elif REDUCE == "mean":
        b_merged = (b_own + b_added) / (1.0 + joined)
    else:
        b_merged = b_own + b_added / tl.maximum(joined, 1)
    b_merged = tl.where(joined > 0, b_merged, b_own)
    tl.store(p_merged + (i_b * K + i_k) * D + o_d, b_merged.to(p_merged.dtype.element_ty), mask=m_d)
    size = own_size + tl.sum(b_gained, 0)
    tl.store(p_sizes + i_b * K + i_k, size.to(p_sizes.dtype.element_ty), mask=i_d == 0)


def merged(
    feature: torch.Tensor,
    size: torch.Tensor,
    index: torch.Tensor,
    to: torch.Tensor,
    reduce: Reduce,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(feature [B, K, D], size [B, K]) like the inputs: the tokens at `index`, each with those that go to its place.

    Args:
        feature: [B, V, D] float; size: [B, V] float.
        index: [B, K] int64, tokens that stay, -1 pads, which become zeros.
        to: [B, V] int64, the column of `index` that a token goes to, -1 for none; a token that stays goes nowhere.
        reduce: mean, (x + members) / (1 + number of members); target_mean, x + mean of the members; weighted, the mean
            by weight of x and members. A token that nothing comes to is left as it is.
        weight: [B, V] float for `weighted`.
    """
    feature = feature if feature.stride(2) == 1 else feature.contiguous()
    size, index, to = size.contiguous(), index.contiguous(), to.contiguous()
    weight = size if weight is None else weight.contiguous()
    batch, visual, width = feature.shape
    stay = index.shape[1]
    joined, sizes = feature.new_empty(batch, stay, width), size.new_empty(batch, stay)
    if joined.numel():
        chosen = setting("merge_rows", visual)
        _merge_kernel[(stay, cdiv(width, chosen["block_d"]), batch)](
            feature,
            size,
            weight,
            index,
            to,
            joined,
            sizes,
            visual,
            stay,
            width,
            *feature.stride()[:2],
            REDUCE=reduce,
            BLOCK_V=chosen["block_v"],
            BLOCK_D=chosen["block_d"],
            num_warps=chosen["warps"],
        )
    return joined, sizes
