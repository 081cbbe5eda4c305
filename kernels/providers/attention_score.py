"""attention_score on Triton: softmax in parts over the keys, two ways to add up what the visual tokens receive.

A first launch leaves the softmax's sums (see _attention.py).
*rows* (few rows: the last token, a class token): that launch stores its logits, O(B H R N) in float32, and a second
one reads them where the visual tokens are. Keys are read once.
*columns* (many rows): nothing of size R x N is stored. A second launch computes the logits again by tiles of keys, adds
up each key's share over all rows, and a third one pools heads and reads the visual tokens.

Every sum has a fixed order.
"""

from __future__ import annotations

from typing import Literal

import torch

from tvc.kernels.providers import Support, no
from tvc.kernels.providers._attention import Softmax, logits, room, whole
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, fitting, jit, power, tl

FEW_ROWS = 64  # of one key group: what a tile of logits has room for


@jit
def _token_columns(p_columns, i_b, i_v, V, g, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_V * BLOCK_G] int64: the keys of a tile of visual tokens, -1 where there is none."""
    o_c = tl.arange(0, BLOCK_V * BLOCK_G)
    o_v, o_g = i_v * BLOCK_V + o_c // BLOCK_G, o_c % BLOCK_G
    return tl.load(p_columns + (i_b * V + o_v) * g + o_g, mask=(o_v < V) & (o_g < g), other=-1)


@jit
def _store_mean(p_score, i_b, i_v, V, b_pooled, b_column, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr):
    """Writes the mean over each token's keys; 0 for a token without any."""
    m_c = b_column >= 0
    b_sum = tl.sum(tl.reshape(tl.where(m_c, b_pooled, 0.0), [BLOCK_V, BLOCK_G]), 1)
    b_number = tl.sum(tl.reshape(m_c.to(tl.float32), [BLOCK_V, BLOCK_G]), 1)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    tl.store(p_score + i_b * V + o_v, b_sum / tl.maximum(b_number, 1.0), mask=o_v < V)


@jit
def _gather_kernel(
    p_logit, p_high, p_total, p_rows, p_columns, p_score,
    R, N, V, g, parts,
    LINES: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V:
    tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """*rows*: the share of each visual token from stored logits; LINES is the number of heads, 1 where joined."""
    i_v, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_column = _token_columns(p_columns, i_b, i_v, V, g, BLOCK_V, BLOCK_G)
    b_pooled = tl.zeros([BLOCK_V * BLOCK_G], tl.float32)
    for i_h in range(0, LINES, BLOCK_H):
        o_h = i_h + tl.arange(0, BLOCK_H)
        m_h = o_h < LINES
        b_received = tl.zeros([BLOCK_H, BLOCK_V * BLOCK_G], tl.float32)
        rows = tl.full([], 0.0, tl.float32)
        for i_r in range(R):
            real = (tl.load(p_rows + i_b * R + i_r) >= 0).to(tl.float32)
            rows += real
            o_line = (i_b * LINES + o_h) * R + i_r
            b_top, b_sum = whole(p_high, p_total, o_line, m_h, parts, BLOCK_S)
            p_l = p_logit + o_line[:, None] * N + b_column[None, :]
            m_l = m_h[:, None] & (b_column >= 0)[None, :]
            b_logit = tl.load(p_l, mask=m_l, other=float("-inf"))  # [BLOCK_H, BLOCK_V * BLOCK_G]
            b_received += tl.exp(b_logit - b_top[:, None]) / b_sum[:, None] * real
        b_received = b_received / tl.maximum(rows, 1.0)
        if MAX:
            b_pooled = tl.maximum(b_pooled, tl.max(b_received, 0))
        else:
            b_pooled += tl.sum(b_received, 0)
    if MEAN:
        b_pooled = b_pooled / LINES
    _store_mean(p_score, i_b, i_v, V, b_pooled, b_column, BLOCK_V, BLOCK_G)


@jit
def _columns_kernel(
    p_query, p_key, p_mask, p_place, p_rows, p_high, p_total, p_received,
    R, N, d, parts, scale, s_qb, s_qh, s_qq, s_kb, s_kg, s_kn, s_mb, s_mh, s_mq, s_mn, s_pb,
    UNITS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, JOINED: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """*columns*: what a tile of keys receives from all rows of the TOGETHER heads of one unit, added up."""
    i_n = tl.program_id(0)
    i_unit = (tl.program_id(1) % UNITS).to(tl.int64)
    i_b = (tl.program_id(1) // UNITS).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    b_received = tl.zeros([BLOCK_N], tl.float32)
    b_rows = tl.zeros([BLOCK_M], tl.float32)
    for i_m in range(0, TOGETHER * R, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_row = tl.load(p_rows + i_b * R + o_m % R, mask=o_m < TOGETHER * R, other=-1)  # [BLOCK_M] int64
        m_row = b_row >= 0
        o_head = (i_unit * TOGETHER + o_m // R) * (0 if JOINED else 1)
        b_logit = logits(
            p_query + i_b * s_qb, p_key + i_b * s_kb, p_mask + i_b * s_mb, p_place + i_b * s_pb,
            tl.maximum(b_row, 0), o_head, m_row, o_n, i_unit * TOGETHER // GROUP, N, d, scale, s_qh, s_qq, s_kg, s_kn,
            s_mh, s_mq, s_mn, HEADS, GROUP, BLOCK_M, BLOCK_N, BLOCK_D, JOINED, MASKED, WIDE,
        )  # fmt: skip
        o_line = (i_b * UNITS + i_unit) * TOGETHER * R + o_m
        b_top, b_sum = whole(p_high, p_total, o_line, m_row, parts, BLOCK_S)
        b_share = tl.exp(b_logit - b_top[:, None]) / b_sum[:, None]
        b_received += tl.sum(tl.where(m_row[:, None], b_share, 0.0), 0)
        b_rows += m_row.to(tl.float32)
    # Each row was met once a head.
    rows = tl.maximum(tl.sum(b_rows, 0) / TOGETHER, 1.0)
    tl.store(p_received + (i_b * UNITS + i_unit) * N + o_n, b_received / rows, mask=o_n < N)


@jit
def _pool_kernel(
    p_received, p_columns, p_score,
    N, V, g,
    UNITS: tl.constexpr, DIVISOR: tl.constexpr, MAX: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """*columns*: the units pooled, read at each visual token's keys."""
    i_v, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_column = _token_columns(p_columns, i_b, i_v, V, g, BLOCK_V, BLOCK_G)
    b_pooled = tl.zeros([BLOCK_V * BLOCK_G], tl.float32)
    for i_u in range(UNITS):
        p_r = p_received + (i_b * UNITS + i_u) * N + b_column
        b_received = tl.load(p_r, mask=b_column >= 0, other=0.0)  # [BLOCK_V * BLOCK_G]
        if MAX:
            b_pooled = tl.maximum(b_pooled, b_received)
        else:
            b_pooled += b_received
    _store_mean(p_score, i_b, i_v, V, b_pooled / DIVISOR, b_column, BLOCK_V, BLOCK_G)


def variant(query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, heads: str) -> Literal["rows", "columns"]:
    """Which of the two ways these arguments take."""
    lines = rows.shape[1] if heads == "joined" else rows.shape[1] * (query.shape[1] // key.shape[1])
    return "rows" if lines <= FEW_ROWS else "columns"


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str,
    softcap: float = 0.0,
) -> Support:
    if columns.shape[2] > 64:
        return no(f"a visual token has {columns.shape[2]} keys; a tile has room for 64")
    return room(query, key, mask, softcap)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: the attention that `rows` pay to `columns`; `heads` is mean, sum, max or joined."""
    return scored(query, key, mask, None, rows, columns, scale, heads)


def scored(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    places: tuple[torch.Tensor, torch.Tensor] | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str,
) -> torch.Tensor:
    """[B, V] float32, by a mask or by positions of queries and keys."""
    batch, visual, members = columns.shape
    if columns.numel() == 0 or rows.numel() == 0:
        return torch.zeros(batch, visual, device=query.device)
    rows, columns = rows.contiguous(), columns.contiguous()
    softmax = Softmax(query, key, mask, rows.shape[1], scale, heads, places)
    few = variant(query, key, rows, heads) == "rows"
    stored, high, total = softmax.stats(rows, few)
    score = torch.empty(batch, visual, dtype=torch.float32, device=query.device)
    many = power(members)
    if few:
        chosen = setting("attention_score.gather", visual)
        block = max(1, chosen["block_v"] // many)
        _gather_kernel[(cdiv(visual, block), batch)](
            stored, high, total, rows, columns, score, rows.shape[1], key.shape[2], visual, members, softmax.parts,
            LINES=softmax.lines, MEAN=heads == "mean", MAX=heads == "max", BLOCK_H=min(32, power(softmax.lines)),
            BLOCK_S=power(softmax.parts), BLOCK_V=block, BLOCK_G=many, num_warps=chosen["warps"],
        )  # fmt: skip
        return score
    received = _received(softmax, rows, high, total, apart=heads == "max")
    chosen = setting("attention_score.pool", visual)
    block = max(1, chosen["block_v"] // many)
    _pool_kernel[(cdiv(visual, block), batch)](
        received, columns, score, key.shape[2], visual, members,
        UNITS=received.shape[1], DIVISOR=softmax.lines if heads == "mean" else 1, MAX=heads == "max", BLOCK_V=block,
        BLOCK_G=many, num_warps=chosen["warps"],
    )  # fmt: skip
    return score


def _received(
    softmax: Softmax, rows: torch.Tensor, high: torch.Tensor, total: torch.Tensor, apart: bool
) -> torch.Tensor:
    """[B, units, N] float32: what each key receives from a group's heads together, or from each head apart."""
    batch, length = rows.shape[0], softmax.key.shape[2]
    units = softmax.lines if apart else softmax.units
    received = torch.empty(batch, units, length, dtype=torch.float32, device=rows.device)
    chosen = setting("attention_score.columns", length)
    width, dtype = softmax.constants["BLOCK_D"], softmax.query.dtype
    block_n = fitting(chosen["block_n"], width, dtype)
    _columns_kernel[(cdiv(length, block_n), batch * units)](
        softmax.query, softmax.key, softmax.mask, softmax.place, rows, high, total, received, softmax.rows, length,
        softmax.query.shape[3], softmax.parts, softmax.scale, *softmax.strides,
        UNITS=units, TOGETHER=softmax.lines // units, BLOCK_M=fitting(chosen["block_m"], width, dtype), BLOCK_N=block_n,
        BLOCK_S=power(softmax.parts), num_warps=chosen["warps"], num_stages=2, **softmax.constants,
    )  # fmt: skip
    return received
