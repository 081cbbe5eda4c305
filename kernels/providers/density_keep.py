"""density_keep on Triton: densities by tiles of cosines, then every centre in one program a segment.

The tiles leave one bit for each two tokens of the pool, set where they are within the cutoff; a round of the second
launch reads the bits of the centre that it took. Cosines themselves are never in memory.
"""

from __future__ import annotations

import torch

from tvc.kernels.portions import Portion
from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._directions import FLOATS, directed
from tvc.kernels.providers._greedy import first_best, store_taken
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._select import best
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, fitting, jit, power, tl, widened
from tvc.kernels.segments import per_token, rows_at
from tvc.kernels.select_threshold import largest

MOST_TOKENS = 16384  # of a pool: what one program holds in registers
MOST_BYTES = 1 << 30  # of bits


@jit
def _density_kernel(
    p_metric, p_inverse, p_group, p_density, p_near,
    P, d, words, cutoff,
    BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of exp(-(distance / 2)^2) over a tile's groups; which of them are within the cutoff, 32 in a word."""
    i_a = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_metric += i_b * P * d
    p_inverse += i_b * P
    p_group += i_b * P
    o_a = i_a * BLOCK_A + tl.arange(0, BLOCK_A)
    o_row = o_a.to(tl.int64)
    b_scope = tl.load(p_group + o_a, mask=o_a < P, other=-1)  # [BLOCK_A]
    b_scale = tl.load(p_inverse + o_a, mask=o_a < P, other=0.0)  # [BLOCK_A]
    b_density = tl.zeros([BLOCK_A], tl.float32)
    for i_c in range(0, P, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_other = tl.load(p_group + o_c, mask=o_c < P, other=-1)  # [BLOCK_C]
        b_its = tl.load(p_inverse + o_c, mask=o_c < P, other=0.0)  # [BLOCK_C]
        b_dot = tl.zeros([BLOCK_A, BLOCK_C], tl.float32)
        for i_d in range(0, d, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            p_x = p_metric + o_row[:, None] * d + o_d[None, :]
            p_y = p_metric + o_c.to(tl.int64)[None, :] * d + o_d[:, None]
            b_x = tl.load(p_x, mask=(o_a < P)[:, None] & (o_d < d)[None, :], other=0.0)  # [BLOCK_A, BLOCK_D]
            b_y = tl.load(p_y, mask=(o_d < d)[:, None] & (o_c < P)[None, :], other=0.0)  # [BLOCK_D, BLOCK_C]
            if WIDE:
                b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
            b_dot += tl.dot(b_x, b_y, input_precision="ieee")
        b_apart = tl.maximum(1.0 - b_dot * b_scale[:, None] * b_its[None, :], 0.0)
        b_apart = tl.where(o_a[:, None] == o_c[None, :], 0.0, b_apart)
        m_same = b_scope[:, None] == b_other[None, :]
        b_density += tl.sum(tl.where(m_same, tl.exp(-b_apart * b_apart / 4.0), 0.0), 1)
        b_bit = (m_same & (b_apart <= cutoff)).to(tl.int32)
        b_bit = tl.reshape(b_bit, [BLOCK_A, BLOCK_C // 32, 32]) << tl.arange(0, 32)[None, None, :]
        o_w = i_c // 32 + tl.arange(0, BLOCK_C // 32)
        p_w = p_near + (i_b * P + o_row)[:, None] * words + o_w[None, :]
        tl.store(p_w, tl.sum(b_bit, 2), mask=(o_a < P)[:, None] & (o_w < words)[None, :])
    tl.store(p_density + i_b * P + o_a, b_density, mask=o_a < P)


@jit
def _centres_kernel(p_density, p_near, p_group, p_flag, P, N, words, BLOCK_P: tl.constexpr):
    """Flags of the centres of one segment, the densest that is left first."""
    i_n = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    b_group = tl.load(p_group + i_b * P + o_p, mask=o_p < P, other=-1)  # [BLOCK_P]
    m_p = b_group == i_n
    b_density = tl.load(p_density + i_b * P + o_p, mask=m_p, other=0.0)  # [BLOCK_P]
    b_free = m_p
    b_other = o_p >= 0  # what is no centre
    left = tl.sum(b_free.to(tl.int32), 0)
    while left > 0:
        picked = first_best(b_density, b_free, o_p, 0.0, BLOCK_P)
        b_other = b_other & (o_p != picked)
        b_word = tl.load(p_near + (i_b * P + picked) * words + o_p // 32, mask=m_p, other=0)  # [BLOCK_P]
        b_free = b_free & (((b_word >> (o_p % 32)) & 1) == 0) & (o_p != picked)
        left = tl.sum(b_free.to(tl.int32), 0)
    store_taken(p_flag + i_b * P, b_group, b_other, o_p, i_n, P, N)


def _room(segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int) -> int:
    """How many tokens the pool of a sample has at most."""
    visual, number = segment.shape[1], counts.shape[1]
    return min(visual, count * number) if count > 0 else Portion.read(permille, count).room(visual, number)


def supports(
    metric: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    cutoff: float,
) -> Support:
    if metric.dtype not in FLOATS:
        return no(f"the metric is {metric.dtype}, not float32, float16 or bfloat16")
    pool = _room(segment, counts, permille, count)
    if pool > MOST_TOKENS:
        return no(f"there are {pool} tokens in the pool; one program holds {MOST_TOKENS}")
    if segment.shape[0] * pool * pool > 8 * MOST_BYTES:
        return no(f"bits of all pairs of {segment.shape[0]} x {pool} tokens take more than {MOST_BYTES >> 20} MiB")
    return YES


def launch(
    metric: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    cutoff: float,
) -> torch.Tensor:
    """[B, K] int64: the centres of each segment; K is the largest number of a sample."""
    batch, pool = segment.shape[0], _room(segment, counts, permille, count)
    if pool == 0 or counts.shape[1] == 0:
        return torch.full((batch, 0), -1, dtype=torch.int64, device=segment.device)
    score = torch.where(torch.isnan(score), torch.finfo(torch.float32).min, score.float())
    index = packed(best(score, segment, counts, permille, count), pool)
    group = torch.where(index < 0, -1, per_token(segment, index))
    rows, inverse = directed(rows_at(metric, index))
    chosen = setting("density_keep", pool)
    block_d = chosen["block_d"]
    block_a, block_c = (fitting(chosen[name], block_d, rows.dtype) for name in ("block_a", "block_c"))
    words = cdiv(pool, 32)
    density = torch.empty(batch, pool, dtype=torch.float32, device=rows.device)
    near = torch.empty(batch, pool, words, dtype=torch.int32, device=rows.device)
    _density_kernel[(cdiv(pool, block_a), batch)](
        rows, inverse, group, density, near, pool, rows.shape[2], words, cutoff,
        BLOCK_A=block_a, BLOCK_C=max(32, block_c), BLOCK_D=block_d,  # 32 tokens are a word
        WIDE=widened(rows.dtype), num_warps=chosen["warps"],
    )  # fmt: skip
    flag = torch.empty(batch, pool, dtype=torch.int8, device=rows.device)
    block = max(16, power(pool))
    _centres_kernel[(counts.shape[1], batch)](
        density, near, group, flag, pool, counts.shape[1], words,
        BLOCK_P=block, num_warps=setting("density_keep.centres", pool)["warps"],
    )  # fmt: skip
    place = packed(flag, largest(flag > 0))
    return torch.where(place < 0, -1, per_token(index, place))
