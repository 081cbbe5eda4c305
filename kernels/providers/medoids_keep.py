"""medoids_keep on Triton: all distances by tiles, the start in one program a segment, three launches a round.

A round asks which medoid each token is nearest, how far each token is from the others of its group, and which of a
group is nearest all. The list of medoids keeps its order from round to round, so that one that stays is seen to.
"""

from __future__ import annotations

import torch

from tvc.kernels.greedy import EQUAL
from tvc.kernels.providers import Support, no
from tvc.kernels.providers._apart import strip
from tvc.kernels.providers._directions import FLOATS
from tvc.kernels.providers._greedy import nothing, room, taken
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, tl
from tvc.kernels.select_medoids import SAME

SLACK = tl.constexpr(EQUAL)


@jit
def _to_medoids(p_apart, p_segment, p_medoid, o_v, o_k, V, K):
    """(medoid [1, BLOCK_K], distance [BLOCK_V, BLOCK_K]) of a tile; inf where the medoid is of another segment."""
    b_medoid = tl.load(p_medoid + o_k, mask=o_k < K, other=-1)  # [BLOCK_K] int64
    b_scope = tl.load(p_segment + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
    # What is read through an index has no mask of its own, see _assign.py.
    o_m = tl.maximum(b_medoid, 0)
    b_other = tl.load(p_segment + o_m)  # [BLOCK_K]
    b_apart = tl.load(p_apart + o_v.to(tl.int64)[:, None] * V + o_m[None, :], mask=(o_v < V)[:, None], other=0.0)
    m_same = (b_scope[:, None] == b_other[None, :]) & (b_medoid >= 0)[None, :]
    return b_medoid[None, :], tl.where(m_same, b_apart, float("inf"))


@jit
def _group_kernel(p_apart, p_segment, p_medoid, p_group, V, K, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """The nearest medoid of each token, the first of equals; -1 where its segment has none."""
    i_b = tl.program_id(1).to(tl.int64)
    p_apart += i_b * V * V
    p_segment += i_b * V
    p_medoid += i_b * K
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    b_low = tl.full([BLOCK_V], float("inf"), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        _, b_apart = _to_medoids(p_apart, p_segment, p_medoid, o_v, o_k, V, K)
        b_low = tl.minimum(b_low, tl.min(b_apart, 1))
    b_first = tl.zeros([BLOCK_V], tl.int64) + V
    b_own = tl.zeros([BLOCK_V], tl.int32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_medoid, b_apart = _to_medoids(p_apart, p_segment, p_medoid, o_v, o_k, V, K)
        m_near = b_apart <= (b_low + SLACK * b_low)[:, None]
        b_first = tl.minimum(b_first, tl.min(tl.where(m_near, b_medoid, V), 1))
        b_own = tl.maximum(b_own, tl.max((b_medoid == o_v[:, None]).to(tl.int32), 1))
    # A medoid stays with itself, whatever copies of it came before.
    b_group = tl.where(b_own > 0, o_v.to(tl.int64), b_first)
    tl.store(p_group + i_b * V + o_v, tl.where(b_low < float("inf"), b_group, -1), mask=o_v < V)


@jit
def _sums_kernel(p_apart, p_group, p_sum, V, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """How far each token is from the others of its group, added up."""
    i_b = tl.program_id(1).to(tl.int64)
    p_group += i_b * V
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    b_group = tl.load(p_group + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
    b_sum = tl.zeros([BLOCK_V], tl.float32)
    for i_k in range(0, V, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_other = tl.load(p_group + o_k, mask=o_k < V, other=-2)  # [BLOCK_K]
        p_tile = p_apart + (i_b * V + o_v)[:, None] * V + o_k[None, :]
        m_same = (b_group[:, None] == b_other[None, :]) & (b_group >= 0)[:, None]
        b_sum += tl.sum(tl.load(p_tile, mask=m_same, other=0.0), 1)
    tl.store(p_sum + i_b * V + o_v, b_sum, mask=o_v < V)


@jit
def _medoid_kernel(p_group, p_sum, p_medoid, p_moved, V, K, BLOCK: tl.constexpr):
    """The token of one group with the smallest sum, the first of equals; -1 stays."""
    i_k = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    p_group += i_b * V
    p_sum += i_b * V
    medoid = tl.load(p_medoid + i_b * K + i_k)
    b_low = tl.full([BLOCK], float("inf"), tl.float32)
    for i_v in range(0, V, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        m_v = tl.load(p_group + o_v, mask=o_v < V, other=-2) == medoid
        b_low = tl.minimum(b_low, tl.load(p_sum + o_v, mask=m_v, other=float("inf")))
    low = tl.min(b_low, 0)
    b_first = tl.zeros([BLOCK], tl.int32) + V
    for i_v in range(0, V, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        m_v = tl.load(p_group + o_v, mask=o_v < V, other=-2) == medoid
        b_sum = tl.load(p_sum + o_v, mask=m_v, other=float("inf"))
        b_first = tl.minimum(b_first, tl.where(m_v & (b_sum <= low + SLACK * low), o_v, V))
    moved = tl.where(medoid >= 0, tl.min(b_first, 0), -1)
    tl.store(p_moved + i_b * K + i_k, moved.to(tl.int64))


def supports(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
    rounds: int,
) -> Support:
    if feature.dtype not in FLOATS:
        return no(f"the feature is {feature.dtype}, not float32, float16 or bfloat16")
    return room(segment)


def launch(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
    rounds: int,
) -> torch.Tensor:
    """[B, slots] int64: the medoids of each segment."""
    batch, visual = segment.shape
    if visual == 0 or counts.shape[1] == 0 or slots == 0:
        return nothing(segment, slots)
    segment = segment.contiguous()
    feature = torch.nan_to_num(torch.where((segment >= 0)[:, :, None], feature.float(), 0.0), 0.0, 0.0, 0.0)
    centred = (feature - feature.mean(1, keepdim=True)).contiguous()
    apart = strip(centred, centred.square().sum(2), 0, visual, copies=SAME)
    long = feature.square().sum(2).sqrt()
    medoid = taken("max_min", -apart, long, long, segment, counts, permille, count, slots, unit=0.0)
    chosen = setting("medoids_keep", visual)
    blocks = {"BLOCK_V": chosen["block_v"], "BLOCK_K": chosen["block_k"], "num_warps": chosen["warps"]}
    tiles = (cdiv(visual, chosen["block_v"]), batch)
    group, total = torch.empty_like(segment), torch.empty_like(long)
    for _ in range(rounds):
        moved = torch.empty_like(medoid)
        _group_kernel[tiles](apart, segment, medoid, group, visual, slots, **blocks)
        _sums_kernel[tiles](apart, group, total, visual, **blocks)
        _medoid_kernel[(slots, batch)](group, total, medoid, moved, visual, slots, BLOCK=256, num_warps=4)
        if torch.equal(moved, medoid):
            break
        medoid = moved
    return medoid.sort(1).values
