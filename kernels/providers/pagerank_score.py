"""pagerank_score on Triton: a step of the walk is one pass over the logits, which are computed again each time.

A first launch leaves the softmax's sums (see _attention.py). A step adds up, for a tile of keys, what the rows have
times the share of it that they pass on; nothing of size R x N is stored.
"""

from __future__ import annotations

import torch

from tvc.kernels.providers import Support
from tvc.kernels.providers._attention import Softmax, logits, room, whole
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, fitting, jit, power, tl
from tvc.kernels.score_pagerank import at_places, of_tokens


@jit
def _step_kernel(
    p_query, p_key, p_mask, p_place, p_rows, p_high, p_total, p_chance, p_next,
    R, N, d, parts, past, scale, s_qb, s_qh, s_qq, s_kb, s_kg, s_kn, s_mb, s_mh, s_mq, s_mn, s_pb,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, JOINED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The chance to be at a tile of keys after one more step, in one head."""
    i_n = tl.program_id(0)
    i_h = (tl.program_id(1) % HEADS).to(tl.int64)
    i_b = (tl.program_id(1) // HEADS).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    b_next = tl.zeros([BLOCK_N], tl.float32)
    for i_m in range(0, R, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_row = tl.load(p_rows + i_b * R + o_m, mask=o_m < R, other=-1)  # [BLOCK_M] int64
        m_row = b_row >= 0
        o_row = tl.maximum(b_row, 0)
        b_logit = logits(
            p_query + i_b * s_qb, p_key + i_b * s_kb, p_mask + i_b * s_mb, p_place + i_b * s_pb,
            o_row, o_m * 0 + i_h, m_row, o_n, i_h // GROUP, N, d, scale, s_qh, s_qq, s_kg, s_kn, s_mh, s_mq, s_mn,
            HEADS, GROUP, BLOCK_M, BLOCK_N, BLOCK_D, JOINED, MASKED, WIDE,
        )  # fmt: skip
        b_top, b_sum = whole(p_high, p_total, (i_b * HEADS + i_h) * R + o_m, m_row, parts, BLOCK_S)
        # What is read through an index has no mask of its own, see _assign.py.
        b_chance = tl.load(p_chance + (i_b * HEADS + i_h) * N + o_row + past) / b_sum  # [BLOCK_M]
        b_moved = tl.exp(b_logit - b_top[:, None]) * b_chance[:, None]
        b_next += tl.sum(tl.where(m_row[:, None], b_moved, 0.0), 0)
    tl.store(p_next + (i_b * HEADS + i_h) * N + o_n, b_next, mask=o_n < N)


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    temperature: float,
    rounds: int,
    softcap: float = 0.0,
) -> Support:
    return room(query, key, mask, softcap)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    temperature: float,
    rounds: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: where `rounds` steps along the attention lead."""
    batch, heads, length = query.shape[0], query.shape[1], key.shape[2]
    if columns.numel() == 0 or rows.numel() == 0:
        return torch.zeros(columns.shape[:2], device=query.device)
    rows, past = rows.contiguous(), length - query.shape[2]
    softmax = Softmax(query, key, mask, rows.shape[1], scale / temperature, "mean")
    _, high, total = softmax.stats(rows, False)
    real = (rows >= 0).float()
    start = at_places(real / real.sum(1, keepdim=True).clamp(min=1), rows, past, length)
    chance = start[:, None].expand(batch, heads, length).contiguous()
    chosen, width = setting("pagerank_score", length), softmax.constants["BLOCK_D"]
    block_m, block_n = (fitting(chosen[name], width, query.dtype) for name in ("block_m", "block_n"))
    for _ in range(rounds):
        moved = torch.empty_like(chance)
        _step_kernel[(cdiv(length, block_n), batch * heads)](
            softmax.query, softmax.key, softmax.mask, softmax.place, rows, high, total, chance, moved,
            rows.shape[1], length, query.shape[3], softmax.parts, past, softmax.scale, *softmax.strides,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_S=power(softmax.parts), num_warps=chosen["warps"], num_stages=2,
            **softmax.constants,
        )  # fmt: skip
        chance = moved
    everywhere = chance.square().mean(1).sqrt()
    rank = everywhere.gather(1, rows.clamp(min=0) + past) * real
    return of_tokens(at_places(rank, rows, past, length), columns)
