"""Attention of one query a sample over a long cache: parts of the keys side by side, then their softmax joined.

Query heads that share a key group are the rows of one tile, so that a key is read once a group. Every sum has a fixed
order.
"""

from __future__ import annotations

import functools

import torch

from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, power, tl, widened

MOST_PARTS = 64
LEAST_KEYS = 1024  # of a part: a second launch costs more than reading so few keys in one go
WAVES = 2  # programs for each multiprocessor: enough to keep all of them reading


@jit
def _part_kernel(
    p_query, p_key, p_value, p_now, p_place, p_out, p_high, p_total,
    N, d, e, keys, parts, scale, s_qb, s_qh, s_kb, s_kg, s_kn, s_vb, s_vg, s_vn, s_nb, s_pb,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Highest logit, sum of exponentials and weighted values of one part of the keys, for the heads of one group.

    WHOLE: there is one part, and what is stored is its result.
    """
    i_part, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_h, o_d, o_e = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    o_head = i_g * GROUP + o_h
    m_h, m_d, m_e = o_h < GROUP, o_d < d, o_e < e
    b_now = tl.load(p_now + i_b * s_nb)
    p_q = p_query + i_b * s_qb + o_head[:, None] * s_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_h[:, None] & m_d[None, :], other=0.0)  # [BLOCK_H, BLOCK_D]
    b_high = tl.full([BLOCK_H], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_H], tl.float32)
    b_sum = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    for i_n in range(i_part * keys, tl.minimum(i_part * keys + keys, N), BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < N
        b_place = tl.load(p_place + i_b * s_pb + o_n, mask=m_n, other=-1)
        m_seen = m_n & (((b_place >= 0) & (b_place <= b_now)) | (b_now < 0))
        p_k = p_key + i_b * s_kb + i_g * s_kg + o_n[None, :] * s_kn + o_d[:, None]
        p_v = p_value + i_b * s_vb + i_g * s_vg + o_n[:, None] * s_vn + o_e[None, :]
        b_k = tl.load(p_k, mask=m_d[:, None] & m_n[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        b_v = tl.load(p_v, mask=m_n[:, None] & m_e[None, :], other=0.0)  # [BLOCK_N, BLOCK_E]
        if WIDE:
            b_logit = tl.dot(b_q.to(tl.float32), b_k.to(tl.float32), input_precision="ieee") * scale
        else:
            b_logit = tl.dot(b_q, b_k) * scale
        b_logit = tl.where(m_seen[None, :], b_logit, float("-inf"))
        b_new = tl.maximum(b_high, tl.max(b_logit, 1))
        # A part without any key that counts has no highest logit: its weights are 0, not exp(-inf + inf).
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp(b_logit - b_base[:, None])
        b_shrunk = tl.exp(b_high - b_base)
        b_total = b_total * b_shrunk + tl.sum(b_weight, 1)
        if WIDE:
            b_part = tl.dot(b_weight, b_v.to(tl.float32), input_precision="ieee")
        else:
            b_part = tl.dot(b_weight.to(b_v.dtype), b_v)
        b_sum = b_sum * b_shrunk[:, None] + b_part
        b_high = b_new
    o_line = ((i_b * tl.num_programs(1) + i_g) * GROUP + o_h) * parts + i_part  # [BLOCK_H] int64
    p_o = p_out + o_line[:, None] * e + o_e[None, :]
    m_o = m_h[:, None] & m_e[None, :]
    if WHOLE:
        tl.store(p_o, (b_sum / b_total[:, None]).to(p_out.dtype.element_ty), mask=m_o)
    else:
        tl.store(p_high + o_line, b_high, mask=m_h)
        tl.store(p_total + o_line, b_total, mask=m_h)
        tl.store(p_o, b_sum, mask=m_o)


@jit
def _join_kernel(p_part, p_high, p_total, p_out, parts, e, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """The parts of one head as one softmax."""
    i_line = tl.program_id(0).to(tl.int64)
    o_p, o_e = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    m_p, m_e = o_p < parts, o_e < e
    b_high = tl.load(p_high + i_line * parts + o_p, mask=m_p, other=float("-inf"))
    b_total = tl.load(p_total + i_line * parts + o_p, mask=m_p, other=0.0)
    b_share = tl.exp(b_high - tl.max(b_high, 0))  # [BLOCK_P]
    p_x = p_part + (i_line * parts + o_p)[:, None] * e + o_e[None, :]
    b_x = tl.load(p_x, mask=m_p[:, None] & m_e[None, :], other=0.0)  # [BLOCK_P, BLOCK_E]
    b_out = tl.sum(b_x * b_share[:, None], 0) / tl.sum(b_total * b_share, 0)
    tl.store(p_out + i_line * e + o_e, b_out.to(p_out.dtype.element_ty), mask=m_e)


@functools.cache
def _wanted(device: torch.device) -> int:
    """Programs that keep the device busy."""
    if device.type != "cuda":
        return 8
    return WAVES * torch.cuda.get_device_properties(device).multi_processor_count


def attend_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[B, H, 1, e]: the one query of each sample over the keys whose positions are not above its own.

    Args:
        query: [B, H, 1, d]; key, value: [B, G, N, d] and [B, G, N, e], G divides H.
        query_positions, key_positions: [B, 1] and [B, N] int64, -1 pads.
    """
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    key_positions = key_positions if key_positions.stride(1) == 1 else key_positions.contiguous()
    batch, heads, _, width = query.shape
    groups, length, depth = key.shape[1], key.shape[2], value.shape[3]
    chosen = setting("attend.part", length)
    block = chosen["block_n"]
    parts = max(1, min(MOST_PARTS, cdiv(length, LEAST_KEYS), cdiv(_wanted(query.device), batch * groups)))
    keys = cdiv(cdiv(length, parts), block) * block  # of a part, in whole tiles
    parts = cdiv(length, keys)
    lines, block_e = batch * heads, power(depth)
    out = torch.empty(batch, heads, 1, depth, dtype=value.dtype, device=query.device)
    part = high = total = out
    if parts > 1:
        high, total = (torch.empty(lines, parts, dtype=torch.float32, device=query.device) for _ in range(2))
        part = torch.empty(lines, parts, depth, dtype=torch.float32, device=query.device)
    _part_kernel[(parts, groups, batch)](
        query, key, value, query_positions, key_positions, part, high, total,
        length, width, depth, keys, parts, scale,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], query_positions.stride(0), key_positions.stride(0),
        GROUP=heads // groups, BLOCK_H=max(16, power(heads // groups)), BLOCK_N=block, BLOCK_D=max(16, power(width)),
        BLOCK_E=max(16, block_e), WIDE=widened(query.dtype), WHOLE=parts == 1, num_warps=chosen["warps"],
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(lines,)](
            part, high, total, out, parts, depth,
            BLOCK_P=power(parts), BLOCK_E=block_e, num_warps=setting("attend.join", length)["warps"],
        )  # fmt: skip
    return out
