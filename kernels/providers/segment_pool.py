"""segment_pool on Triton: the softmax runs along while the values of a segment are added up, as in attention."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._directions import FLOATS
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, fitting, jit, tl
from tvc.kernels.segments import per_token, ranks

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@jit
def _pool_segment_kernel(
    p_logit, p_value, p_segment, p_own, p_place, p_pooled,
    V, K, d, s_lb, s_lh, s_lv, s_lm, s_vb, s_vv,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_h, i_d = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    i_b = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b_own = tl.load(p_own + i_b * K + o_k, mask=o_k < K, other=-1)  # [BLOCK_K]
    b_place = tl.load(p_place + i_b * K + o_k, mask=o_k < K, other=0)  # [BLOCK_K] int64
    b_high = tl.full([BLOCK_K], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK_K], tl.float32)
    b_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for i_v in range(0, V, BLOCK_V):
        o_v = (i_v + tl.arange(0, BLOCK_V)).to(tl.int64)
        b_scope = tl.load(p_segment + i_b * V + o_v, mask=o_v < V, other=-2)  # [BLOCK_V]
        p_l = p_logit + i_b * s_lb + i_h * s_lh + o_v[None, :] * s_lv + b_place[:, None] * s_lm
        m_same = b_own[:, None] == b_scope[None, :]  # what pads get is not stored
        b_logit = tl.load(p_l, mask=m_same, other=float("-inf")).to(tl.float32)  # [BLOCK_K, BLOCK_V]
        b_new = tl.maximum(b_high, tl.max(b_logit, 1))
        b_share = tl.exp(b_logit - b_new[:, None])
        b_before = tl.exp(b_high - b_new)
        p_v = p_value + i_b * s_vb + o_v[:, None] * s_vv + i_h * d + o_d[None, :]
        b_value = tl.load(p_v, mask=(o_v < V)[:, None] & (o_d < d)[None, :], other=0.0).to(tl.float32)
        b_sum = b_sum * b_before[:, None] + tl.dot(b_share, b_value, input_precision="ieee")
        b_total = b_total * b_before + tl.sum(b_share, 1)
        b_high = b_new
    b_total = tl.where(b_own >= 0, b_total, 1.0)
    b_sum = tl.where((b_own >= 0)[:, None], b_sum / b_total[:, None], 0.0)
    p_o = p_pooled + (i_b * K + o_k)[:, None] * (HEADS * d) + i_h * d + o_d[None, :]
    tl.store(p_o, b_sum, mask=(o_k < K)[:, None] & (o_d < d)[None, :])


def supports(
    logits: torch.Tensor, value: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor
) -> Support:
    if any(given.dtype not in FLOATS for given in (logits, value)):
        return no(f"logits and value are {logits.dtype} and {value.dtype}, not float32, float16 or bfloat16")
    return YES


def launch(
    logits: torch.Tensor, value: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """[B, K, H d] float32: the new tokens."""
    batch, visual, width = value.shape
    heads, most, slots = logits.shape[1], logits.shape[3], chosen.shape[1]
    if visual == 0:
        return torch.zeros(batch, slots, width, device=value.device)
    value = value if value.stride(2) == 1 else value.contiguous()
    segment, chosen = segment.contiguous(), chosen.contiguous()
    own = torch.where(chosen < 0, -1, per_token(segment, chosen))
    there = (own[:, :, None] == torch.arange(counts.shape[1], device=own.device)).sum(1)
    place = ranks(own, there).clamp(min=0, max=most - 1)
    pooled = torch.empty(batch, slots, width, dtype=torch.float32, device=value.device)
    if pooled.numel():
        sizes = setting("segment_pool", visual)
        block_d = sizes["block_d"]
        block_v = fitting(sizes["block_v"], block_d, torch.float32)
        _pool_segment_kernel[(cdiv(slots, 16), heads * cdiv(width // heads, block_d), batch)](
            logits, value, segment, own, place, pooled, visual, slots, width // heads,
            *logits.stride(), *value.stride()[:2],
            HEADS=heads, BLOCK_K=16, BLOCK_V=block_v, BLOCK_D=block_d, num_warps=sizes["warps"],
        )  # fmt: skip
    return pooled
