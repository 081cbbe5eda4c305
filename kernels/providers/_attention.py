"""Logits of attention by tiles, and their softmax in parts over the keys: what scores that read attention share.

For every row and every part of the keys there are the highest logit and the sum of exponentials above it; together
they give the softmax of any tile that is computed again, or of logits that were stored. Rows of the query heads that
share a key group lie below one another in one tile, so that a key is read once a group. Joined heads are one row a
query row, whose dot product runs over all heads. Every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, fitting, jit, power, tl, widened

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
OPEN, MASK, PLACES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what says which keys a row attends to
MOST_PARTS = 64
PROGRAMS = 512  # enough to fill the largest GPUs several times over


@jit
def logits(
    p_query, p_key, p_mask, p_place,
    o_row, o_head, m_row, o_n, i_unit, N, d, scale, s_qh, s_qq, s_kg, s_kn, s_mh, s_mq, s_mn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    JOINED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] float32 logits; LOWEST where the mask or the positions forbid, -inf behind the last key."""
    o_d = tl.arange(0, BLOCK_D)
    m_d, m_n = o_d < d, o_n < N
    b_logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_allowed = m_row[:, None] & m_n[None, :]
    for i_h in range(HEADS if JOINED else 1):
        o_h = i_h + o_head
        i_g = i_h // GROUP if JOINED else i_unit
        p_q = p_query + o_h[:, None] * s_qh + o_row[:, None] * s_qq + o_d[None, :]
        p_k = p_key + i_g * s_kg + o_n[None, :] * s_kn + o_d[:, None]
        b_q = tl.load(p_q, mask=m_row[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        b_k = tl.load(p_k, mask=m_d[:, None] & m_n[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        if WIDE:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_logit += tl.dot(b_q, b_k, input_precision="ieee")
        if MASKED == MASK:
            p_m = p_mask + o_h[:, None] * s_mh + o_row[:, None] * s_mq + o_n[None, :] * s_mn
            b_allowed = b_allowed & (tl.load(p_m, mask=m_row[:, None] & m_n[None, :], other=1) != 0)
    if MASKED == PLACES:
        # Indices are kept inside instead of masked: a mask in two layouts stops Triton 3.6.
        b_own = tl.load(p_place + o_row)  # [BLOCK_M]
        b_its = tl.load(p_mask + tl.minimum(o_n, N - 1) * s_mn)  # [BLOCK_N]
        b_behind = (b_its >= 0)[None, :] & (b_its[None, :] <= b_own[:, None])
        b_allowed = b_allowed & (b_behind | (b_own < 0)[:, None])
    b_logit = tl.where(b_allowed, b_logit * scale, LOWEST)
    return tl.where(m_n[None, :], b_logit, float("-inf"))


@jit
def _stats_kernel(
    p_query, p_key, p_mask, p_place, p_rows, p_logit, p_high, p_total,
    R, N, M, d, keys, scale, s_qb, s_qh, s_qq, s_kb, s_kg, s_kn, s_mb, s_mh, s_mq, s_mn, s_pb,
    UNITS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, JOINED: tl.constexpr, MASKED: tl.constexpr, STORED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Highest logit and sum of exponentials of each row over one part of the keys; the logits where STORED."""
    i_part, i_m = tl.program_id(0), tl.program_id(1)
    i_unit = (tl.program_id(2) % UNITS).to(tl.int64)
    i_b = (tl.program_id(2) // UNITS).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_row = tl.maximum(tl.load(p_rows + i_b * R + o_m % R, mask=m_m, other=0), 0)  # [BLOCK_M] int64
    o_head = (i_unit * GROUP + o_m // R) * (0 if JOINED else 1)
    o_line = (i_b * UNITS + i_unit) * M + o_m  # [BLOCK_M] int64
    b_high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(i_part * keys, tl.minimum(i_part * keys + keys, N), BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        b_logit = logits(
            p_query + i_b * s_qb, p_key + i_b * s_kb, p_mask + i_b * s_mb, p_place + i_b * s_pb,
            o_row, o_head, m_m, o_n, i_unit, N, d, scale, s_qh, s_qq, s_kg, s_kn, s_mh, s_mq, s_mn, HEADS, GROUP,
            BLOCK_M, BLOCK_N, BLOCK_D, JOINED, MASKED, WIDE,
        )  # fmt: skip
        if STORED:
            m_logit = m_m[:, None] & (o_n < N)[None, :]
            tl.store(p_logit + o_line[:, None] * N + o_n[None, :], b_logit, mask=m_logit)
        b_new = tl.maximum(b_high, tl.max(b_logit, 1))
        b_total = b_total * tl.exp(b_high - b_new) + tl.sum(tl.exp(b_logit - b_new[:, None]), 1)
        b_high = b_new
    o_stat = o_line * tl.num_programs(0) + i_part
    tl.store(p_high + o_stat, b_high, mask=m_m)
    tl.store(p_total + o_stat, b_total, mask=m_m)


@jit
def whole(p_high, p_total, o_line, m_line, parts, BLOCK_S: tl.constexpr):
    """(highest logit, sum of exponentials) over all keys, [BLOCK] each, of the lines `o_line` [BLOCK]."""
    o_s = tl.arange(0, BLOCK_S)
    m_stat = m_line[:, None] & (o_s < parts)[None, :]
    o_stat = o_line[:, None] * parts + o_s[None, :]
    b_high = tl.load(p_high + o_stat, mask=m_stat, other=LOWEST)  # [BLOCK, BLOCK_S]
    b_total = tl.load(p_total + o_stat, mask=m_stat, other=0.0)  # [BLOCK, BLOCK_S]
    b_top = tl.max(b_high, 1)
    b_sum = tl.sum(b_total * tl.exp(b_high - b_top[:, None]), 1)
    return b_top, tl.where(m_line, b_sum, 1.0)


def room(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, softcap: float) -> Support:
    """Whether tiles of logits can be made of these operands."""
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or key.dtype != query.dtype:
        return no(f"query and key are {query.dtype} and {key.dtype}, not one of float32, float16 and bfloat16")
    if query.shape[3] > 256:
        return no(f"heads are {query.shape[3]} wide; a tile has room for 256")
    if mask is not None and mask.dtype != torch.bool:
        return no(f"the mask is {mask.dtype}, not bool")
    if softcap:
        return no(f"logits have a soft cap of {softcap}")
    return YES


class Softmax:
    """What launches over keys share: operands with their strides, and how rows and keys are divided."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        rows: int,
        scale: float,
        heads: str,
        places: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """`places`: positions of queries and keys, which then say what `mask` would."""
        query, key = (value if value.stride(3) == 1 else value.contiguous() for value in (query, key))
        self.query, self.key, self.rows = query, key, rows
        self.joined = heads == "joined"
        self.heads, self.groups = query.shape[1], key.shape[1]
        self.units = 1 if self.joined else self.groups
        self.lines = 1 if self.joined else self.heads
        self.scale = scale * self.heads**-0.5 if self.joined else scale
        self.mask, self.place, steps = self._allowing(mask, places)
        self.strides = (*query.stride()[:3], *key.stride()[:3], *steps)
        self.constants: dict[str, Any] = {
            "HEADS": self.heads,
            "GROUP": self.heads // self.groups,
            "BLOCK_D": max(16, power(query.shape[3])),
            "JOINED": self.joined,
            "MASKED": PLACES if places is not None else OPEN if mask is None else MASK,
            "WIDE": widened(query.dtype),
        }
        length, together = key.shape[2], self.lines * rows // self.units
        chosen = setting("attention_score.stats", length)
        width = self.constants["BLOCK_D"]
        self.block_m = fitting(min(64, power(together)), width, query.dtype)
        self.block_n, self.warps = fitting(chosen["block_n"], width, query.dtype), chosen["warps"]
        # Keys are divided as far as it takes to fill the device: every reader adds the parts up again.
        others = query.shape[0] * self.units * cdiv(together, self.block_m)
        parts = min(MOST_PARTS, cdiv(PROGRAMS, others), cdiv(length, self.block_n))
        self.keys = cdiv(cdiv(length, parts), self.block_n) * self.block_n
        self.parts = cdiv(length, self.keys)

    def _allowing(
        self, mask: torch.Tensor | None, places: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """What kernels read of a mask [B|1, 1|H, Q, N] or of positions, and the steps of its axes."""
        if places is not None:
            own, its = (place if place.stride(1) == 1 else place.contiguous() for place in places)
            return its, own, (its.stride(0), 0, 0, 1, own.stride(0))
        if mask is None:
            return self.query, self.query, (0, 0, 0, 0, 0)
        # A mask that holds for every sample, head or key is read again and again.
        steps = (0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        return mask.view(torch.uint8), self.query, (*steps, 0)

    def stats(self, rows: torch.Tensor, stored: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits [B, lines, R, N] where stored, highest, sum [B, lines, R, parts]) of rows [B, R] int64, -1 pads."""
        batch, length = self.query.shape[0], self.key.shape[2]
        together = self.lines * self.rows // self.units
        like: dict[str, Any] = {"dtype": torch.float32, "device": self.query.device}
        high, total = torch.empty(2, batch, self.lines, self.rows, self.parts, **like)
        values = torch.empty(batch, self.lines, self.rows, length, **like) if stored else high
        _stats_kernel[(self.parts, cdiv(together, self.block_m), batch * self.units)](
            self.query, self.key, self.mask, self.place, rows, values, high, total, self.rows, length, together,
            self.query.shape[3], self.keys, self.scale, *self.strides,
            UNITS=self.units, BLOCK_M=self.block_m, BLOCK_N=self.block_n, STORED=stored, num_warps=self.warps,
            num_stages=2, **self.constants,
        )  # fmt: skip
        return values, high, total
