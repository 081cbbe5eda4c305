"""Greedy selection in one launch: one program a segment and sample takes token after token from a Gram matrix.

All cosines are computed once, by a matrix product; a round then reads the row of the token it took. What the rule
remembers of each token stays in registers, so that a round is two reductions and one row.
"""

from __future__ import annotations

from typing import Literal

import torch

from tvc.kernels.greedy import EQUAL
from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._budget import stays
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, power, tl
from tvc.kernels.select_log_det import EXPLAINED

Rule = Literal["max_min", "max_sum", "log_det"]
MOST_TOKENS = 8192  # what one program holds in registers
MOST_BYTES = 1 << 30  # of Gram matrices
SLACK, SHARE = tl.constexpr(EQUAL), tl.constexpr(EXPLAINED)


@jit
def budget(p_counts, i_b, i_n, N, permille, count):
    """int32: how many tokens of the segment are taken."""
    tokens = tl.load(p_counts + i_b * N + i_n)
    return stays(tokens, permille, count)


@jit
def first_best(b_value, b_free, o_v, unit, BLOCK_V: tl.constexpr):
    """The lowest free index whose value is the highest, within SLACK of it or of `unit`."""
    b_value = tl.where(b_free, b_value, float("-inf"))
    top = tl.max(b_value, 0)
    least = top - SLACK * tl.maximum(tl.abs(top), unit)
    return tl.min(tl.where(b_free & (b_value >= least), o_v, BLOCK_V - 1), 0)


@jit
def store_taken(p_flag, b_segment, b_free, o_v, i_n, V, N):
    """Writes the flags of a segment's tokens; the first program also those of what is of no segment."""
    b_owner = tl.where((b_segment < 0) | (b_segment >= N), 0, b_segment)
    b_taken = tl.where(b_free, 0, 1) * tl.where(b_segment == i_n, 1, 0)
    tl.store(p_flag + o_v, b_taken.to(tl.int8), mask=(b_owner == i_n) & (o_v < V))


@jit
def _greedy_kernel(
    p_gram, p_start, p_weight, p_factor, p_segment, p_counts, p_flag,
    V, N, rows, permille, count, unit,
    RULE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_gram += i_b * V * V
    p_factor += i_b * rows * V
    o_v = tl.arange(0, BLOCK_V)
    b_segment = tl.load(p_segment + i_b * V + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
    m_v = b_segment == i_n
    b_free = m_v
    b_start = tl.load(p_start + i_b * V + o_v, mask=m_v, other=0.0)  # [BLOCK_V] value of the first round
    b_weight = tl.load(p_weight + i_b * V + o_v, mask=m_v, other=0.0)  # [BLOCK_V]
    b_state = tl.zeros([BLOCK_V], tl.float32)
    if RULE == "max_min":
        b_state += float("-inf")
    if RULE == "log_det":
        b_state += b_start
    for i_k in range(budget(p_counts, i_b, i_n, N, permille, count)):
        if RULE == "log_det":
            b_value = b_state
        else:
            b_value = tl.where(i_k == 0, b_start, -b_state)
        picked = first_best(b_value, b_free, o_v, unit, BLOCK_V)
        m_picked = o_v == picked
        b_free = b_free & (o_v != picked)
        b_cosine = tl.load(p_gram + picked.to(tl.int64) * V + o_v, mask=m_v, other=0.0)  # [BLOCK_V]
        if RULE == "max_min":
            b_state = tl.maximum(b_state, b_cosine)
        elif RULE == "max_sum":
            b_state += b_cosine
        else:
            # The rows of the factor that earlier rounds wrote, a tile at a time.
            tl.debug_barrier()
            b_explained = tl.zeros([BLOCK_V], tl.float32)
            for i_r in range(0, i_k, BLOCK_R):
                o_r = (i_r + tl.arange(0, BLOCK_R)).to(tl.int64)
                m_r = o_r < i_k
                p_row = p_factor + o_r[:, None] * V + o_v[None, :]
                b_row = tl.load(p_row, mask=m_r[:, None] & m_v[None, :], other=0.0)  # [BLOCK_R, BLOCK_V]
                b_at = tl.load(p_factor + o_r * V + picked, mask=m_r, other=0.0)  # [BLOCK_R]
                b_explained += tl.sum(b_row * b_at[:, None], 0)
            left = tl.sum(tl.where(m_picked, b_state, 0.0), 0)
            own = tl.sum(tl.where(m_picked, b_start, 0.0), 0)
            weight = tl.sum(tl.where(m_picked, b_weight, 0.0), 0)
            b_row = (b_weight * weight * b_cosine - b_explained) / tl.sqrt(tl.maximum(left, 1e-30))
            b_row = tl.where(left > SHARE * own, b_row, 0.0)
            b_now = b_state - b_row * b_row
            b_state = tl.where(b_now > SHARE * b_start, b_now, 0.0)
            tl.store(p_factor + i_k * V + o_v, b_row, mask=m_v)
    store_taken(p_flag + i_b * V, b_segment, b_free, o_v, i_n, V, N)


@jit
def _alone_kernel(p_gram, p_segment, p_alone, V, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """Minus the highest cosine of each token with another one of its segment; 2 where it is alone."""
    i_r = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_segment += i_b * V
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    b_scope = tl.load(p_segment + o_r, mask=o_r < V, other=-1)  # [BLOCK_R]
    b_near = tl.full([BLOCK_R], -2.0, tl.float32)
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_other = tl.load(p_segment + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
        m_tile = (o_r < V)[:, None] & (o_v < V)[None, :]
        p_tile = p_gram + (i_b * V + o_r)[:, None] * V + o_v[None, :]
        b_cosine = tl.load(p_tile, mask=m_tile, other=-2.0)  # [BLOCK_R, BLOCK_V]
        m_other = (b_scope[:, None] == b_other[None, :]) & (o_r[:, None] != o_v[None, :])
        b_near = tl.maximum(b_near, tl.max(tl.where(m_other, b_cosine, -2.0), 1))
    tl.store(p_alone + i_b * V + o_r, -b_near, mask=o_r < V)


def room(segment: torch.Tensor) -> Support:
    """Whether a Gram matrix of the tokens is to be had."""
    batch, visual = segment.shape
    if visual > MOST_TOKENS:
        return no(f"there are {visual} visual tokens; one program holds {MOST_TOKENS}")
    if 4 * batch * visual * visual > MOST_BYTES:
        return no(f"cosines of all pairs of {batch} x {visual} tokens take more than {MOST_BYTES >> 20} MiB")
    return YES


def gram(unit: torch.Tensor) -> torch.Tensor:
    """[B, V, V] float32: the cosines of all pairs of `unit [B, V, D]`."""
    return unit @ unit.transpose(1, 2)


def alone(cosines: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: how far off the nearest other token of its segment is, as minus its cosine; 2 without another."""
    batch, visual = segment.shape
    value = torch.empty(batch, visual, dtype=torch.float32, device=segment.device)
    _alone_kernel[(cdiv(visual, 16), batch)](
        cosines, segment.contiguous(), value, visual, BLOCK_R=16, BLOCK_V=128, num_warps=4
    )
    return value


def taken(
    rule: Rule,
    cosines: torch.Tensor,
    start: torch.Tensor,
    weight: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
    unit: float,
) -> torch.Tensor:
    """[B, slots] int64: the tokens that a greedy rule takes, ascending, pads (-1) first.

    Args:
        rule: max_min, max_sum or log_det.
        cosines: [B, V, V] float32, V > 0.
        start: [B, V] float32, values of the first round; for log_det each token's own variance.
        weight: [B, V] float32, of log_det alone.
        segment, counts, permille, count, slots, unit: as for `tvc.kernels.greedy.take`; counts has a column.
    """
    batch, visual = segment.shape
    segment, counts = segment.contiguous(), counts.contiguous()
    flag = torch.empty(batch, visual, dtype=torch.int8, device=segment.device)
    rows = slots if rule == "log_det" else 0
    factor = torch.empty(batch, max(rows, 1), visual, dtype=torch.float32, device=segment.device)
    block = max(16, power(visual))
    _greedy_kernel[(counts.shape[1], batch)](
        cosines,
        start.contiguous(),
        weight.contiguous(),
        factor,
        segment,
        counts,
        flag,
        visual,
        counts.shape[1],
        rows,
        permille,
        count,
        unit,
        RULE=rule,
        BLOCK_V=block,
        BLOCK_R=max(1, min(16, MOST_TOKENS // block)),
        num_warps=setting("greedy", visual)["warps"],
    )
    return packed(flag, slots)


def nothing(segment: torch.Tensor, slots: int) -> torch.Tensor:
    """[B, slots] int64 pads: what is taken where there is no token."""
    return torch.full((segment.shape[0], slots), -1, dtype=torch.int64, device=segment.device)
