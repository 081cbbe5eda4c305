"""The nearest target of each token by cosine, by tiles with a running maximum: no matrix of cosines in memory."""

from __future__ import annotations

import torch

from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, fitting, jit, tl, widened


@jit
def _assign_kernel(
    p_metric, p_segment, p_token, p_target, p_number, p_cosine,
    A, C, V, d, s_b, s_v,
    BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_a = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_metric += i_b * s_b
    o_a = i_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b_token = tl.load(p_token + i_b * A + o_a, mask=o_a < A, other=-1)  # [BLOCK_A] int64
    m_a = b_token >= 0
    # What is read through an index has no mask of its own: Triton 3.6 wants that mask in two layouts, and stops.
    b_scope = tl.load(p_segment + i_b * V + tl.maximum(b_token, 0))
    # Below every cosine, above every target of another segment: what is left without a target has number C.
    b_best = tl.full([BLOCK_A], -2.0, tl.float32)
    b_number = tl.zeros([BLOCK_A], tl.int32) + C
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_target = tl.load(p_target + i_b * C + o_c, mask=o_c < C, other=-1)  # [BLOCK_C] int64
        m_c = b_target >= 0
        b_other = tl.load(p_segment + i_b * V + tl.maximum(b_target, 0))
        b_dot = tl.zeros([BLOCK_A, BLOCK_C], tl.float32)
        b_own = tl.zeros([BLOCK_A], tl.float32)
        b_its = tl.zeros([BLOCK_C], tl.float32)
        for i_d in range(0, d, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            p_x = p_metric + b_token[:, None] * s_v + o_d[None, :]
            p_y = p_metric + b_target[None, :] * s_v + o_d[:, None]
            b_x = tl.load(p_x, mask=m_a[:, None] & (o_d < d)[None, :], other=0.0)  # [BLOCK_A, BLOCK_D]
            b_y = tl.load(p_y, mask=(o_d < d)[:, None] & m_c[None, :], other=0.0)  # [BLOCK_D, BLOCK_C]
            b_xf, b_yf = b_x.to(tl.float32), b_y.to(tl.float32)
            b_own += tl.sum(b_xf * b_xf, 1)
            b_its += tl.sum(b_yf * b_yf, 0)
            if WIDE:
                b_dot += tl.dot(b_xf, b_yf, input_precision="ieee")
            else:
                b_dot += tl.dot(b_x, b_y)
        b_length = tl.maximum(tl.sqrt(b_own), 1e-12)[:, None] * tl.maximum(tl.sqrt(b_its), 1e-12)[None, :]
        m_same = (b_scope[:, None] == b_other[None, :]) & m_a[:, None] & m_c[None, :]
        b_cosine = tl.where(m_same, b_dot / b_length, float("-inf"))
        b_high = tl.max(b_cosine, 1)
        # The first of equals within the tile, and of equal tiles the first.
        b_first = tl.min(tl.where(b_cosine == b_high[:, None], o_c[None, :], C), 1)
        b_number = tl.where(b_high > b_best, b_first, b_number)
        b_best = tl.maximum(b_best, b_high)
    tl.store(p_number + i_b * A + o_a, b_number.to(tl.int64), mask=o_a < A)
    tl.store(p_cosine + i_b * A + o_a, b_best, mask=o_a < A)


def nearest(
    metric: torch.Tensor, segment: torch.Tensor, token: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(number [B, A] int64, cosine [B, A] float32): the column of `target [B, C]` that each `token [B, A]` is nearest.

    The lowest column among equals; C and -2 for a pad (-1) and where no target is of the token's segment.

    Args:
        metric: [B, V, d] float; segment: [B, V] int64.
        token, target: [B, A] and [B, C] int64 indices into V, -1 pads.
    """
    metric = metric if metric.stride(2) == 1 else metric.contiguous()
    segment, token, target = segment.contiguous(), token.contiguous(), target.contiguous()
    batch, tokens = token.shape
    number = torch.empty(batch, tokens, dtype=torch.int64, device=metric.device)
    cosine = torch.empty(batch, tokens, dtype=torch.float32, device=metric.device)
    if number.numel():
        chosen = setting("assign", tokens)
        block_d = chosen["block_d"]
        block_a, block_c = (fitting(chosen[name], block_d, metric.dtype) for name in ("block_a", "block_c"))
        _assign_kernel[(cdiv(tokens, block_a), batch)](
            metric,
            segment,
            token,
            target,
            number,
            cosine,
            tokens,
            target.shape[1],
            segment.shape[1],
            metric.shape[2],
            *metric.stride()[:2],
            BLOCK_A=block_a,
            BLOCK_C=block_c,
            BLOCK_D=block_d,
            WIDE=widened(metric.dtype),
            num_warps=chosen["warps"],
        )
    return number, cosine
