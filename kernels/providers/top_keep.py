"""top_keep on Triton: a threshold for each segment by radix selection, then flags turned into indices.

One program a segment and sample finds the largest threshold that as many scores reach as stay, two bits of the ordered
score at a time, and among equals of the threshold counts from the lowest index. Scores are equal here exactly where
the reference's stable sort takes them to be.
"""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import jit, ordered, tl

MOST = 1 << 20


@jit
def _load(p_score, p_segment, o_v, V, i_n):
    """(key, segment) of a tile: int32 [BLOCK_V] in the order of the scores, the lowest outside the segment."""
    b_segment = tl.load(p_segment + o_v, mask=o_v < V, other=-1)  # [BLOCK_V]
    b_inside = b_segment == i_n
    b_key = ordered(tl.load(p_score + o_v, mask=b_inside, other=0.0))  # [BLOCK_V]
    return tl.where(b_inside, b_key, -2147483648), b_segment


@jit
def _reach(p_score, p_segment, b_whole, threshold, V, i_n, BLOCK_V: tl.constexpr, WHOLE: tl.constexpr):
    """How many keys of the segment are at least `threshold`, `threshold + step` ...: a number each."""
    b_count = tl.zeros([BLOCK_V], tl.int32)
    if WHOLE:
        b_count += (b_whole >= threshold).to(tl.int32)
    else:
        for i_v in range(0, V, BLOCK_V):
            b_key, _ = _load(p_score, p_segment, i_v + tl.arange(0, BLOCK_V), V, i_n)
            b_count += (b_key >= threshold).to(tl.int32)
    return tl.sum(b_count, 0)
