"""merge_clusters on Triton: distances of the pool in strips of rows, of which only what is asked for is kept.

A first walk over the strips leaves how far each token's nearest ones are, a second one the nearest denser token, a
third one the nearest centre; a pool whose distances fit into one strip is computed once. One more launch merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tvc.kernels.peaks import FAR
from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._apart import strip, tile
from tvc.kernels.providers._directions import FLOATS
from tvc.kernels.providers._merge import merged
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._select import best
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, power, tl
from tvc.kernels.segments import mark, per_token, rows_at

MOST_TOKENS = 16384  # of a pool: a row of distances is what one program holds
MOST_BYTES = 1 << 26  # of distances at once
LOST = tl.constexpr(FAR)


@jit
def _tile(p_apart, p_group, first, rows, P, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """(sample, tokens [BLOCK_R], whether they are, others of the group [BLOCK_R, BLOCK_P], distances to them)."""
    i_b = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_p = tl.arange(0, BLOCK_P)
    m_r = o_r < rows
    # Pads are a group as well: what they get is not read.
    b_group = tl.load(p_group + i_b * P + first + o_r, mask=m_r, other=-2)  # [BLOCK_R]
    b_other = tl.load(p_group + i_b * P + o_p, mask=o_p < P, other=-3)  # [BLOCK_P]
    m_same = b_group[:, None] == b_other[None, :]
    b_apart = tl.load(p_apart + (i_b * rows + o_r)[:, None] * P + o_p[None, :], mask=m_same, other=LOST)
    return i_b, first + o_r, m_r, m_same, b_apart


@jit
def _closest_kernel(
    p_apart, p_group, p_number, p_sum, first, rows, P, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """The sum of the `number` smallest distances of a token, itself among them."""
    i_b, o_i, m_i, m_same, b_apart = _tile(p_apart, p_group, first, rows, P, BLOCK_R, BLOCK_P)
    b_number = tl.load(p_number + i_b * P + o_i, mask=m_i, other=1).to(tl.int32)  # [BLOCK_R]
    # Bits of numbers that are not negative order like the numbers: the largest of the smallest, bit by bit.
    b_key = b_apart.to(tl.int32, bitcast=True)
    b_last = tl.zeros([BLOCK_R], tl.int32)
    for i_bit in range(31):
        b_tried = b_last | (tl.full([], 1 << 30, tl.int32) >> i_bit)
        b_below = tl.sum((b_key < b_tried[:, None]).to(tl.int32), 1)
        b_last = tl.where(b_below < b_number, b_tried, b_last)
    m_below = m_same & (b_key < b_last[:, None])
    # In float64 the order does not show: tokens with the same distances are equally dense.
    b_sum = tl.sum(tl.where(m_below, b_apart, 0.0).to(tl.float64), 1)
    b_equals = b_number - tl.sum(m_below.to(tl.int32), 1)
    b_sum += b_last.to(tl.float32, bitcast=True).to(tl.float64) * b_equals
    tl.store(p_sum + i_b * P + o_i, b_sum.to(tl.float32), mask=m_i)


@jit
def _lead_kernel(
    p_apart, p_group, p_density, p_lead, p_reach, first, rows, P, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """How far the nearest denser token of the group is (LOST without one), and the farthest of all."""
    i_b, o_i, m_i, m_same, b_apart = _tile(p_apart, p_group, first, rows, P, BLOCK_R, BLOCK_P)
    o_p = tl.arange(0, BLOCK_P)
    b_own = tl.load(p_density + i_b * P + o_i, mask=m_i, other=0.0)[:, None]
    b_its = tl.load(p_density + i_b * P + o_p, mask=o_p < P, other=0.0)[None, :]
    m_denser = m_same & ((b_its > b_own) | ((b_its == b_own) & (o_p[None, :] < o_i[:, None])))
    tl.store(p_lead + i_b * P + o_i, tl.min(tl.where(m_denser, b_apart, LOST), 1), mask=m_i)
    tl.store(p_reach + i_b * P + o_i, tl.max(tl.where(m_same, b_apart, 0.0), 1), mask=m_i)


@jit
def _join_kernel(
    p_apart, p_group, p_centre, p_to, first, rows, P, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """The nearest centre of the group, the first of equals; what centres get is not read."""
    i_b, o_i, m_i, m_same, b_apart = _tile(p_apart, p_group, first, rows, P, BLOCK_R, BLOCK_P)
    o_p = tl.arange(0, BLOCK_P)
    m_centre = m_same & (tl.load(p_centre + i_b * P + o_p, mask=o_p < P, other=0) > 0)[None, :]
    b_apart = tl.where(m_centre, b_apart, LOST)
    m_nearest = m_centre & (b_apart == tl.min(b_apart, 1)[:, None])
    b_nearest = tl.min(tl.where(m_nearest, o_p[None, :], P - 1), 1)
    tl.store(p_to + i_b * P + o_i, b_nearest.to(tl.int64), mask=m_i)


class _Strips:
    """The distances of a pool, some rows at a time."""

    def __init__(self, point: torch.Tensor):
        batch, self.points, _ = point.shape
        self.point, self.square = point, point.square().sum(2)
        block = tile(self.points)
        fitting = MOST_BYTES // (4 * batch * self.points) // block * block
        self.rows = min(self.points, max(block, fitting))
        self.kept: torch.Tensor | None = None
        chosen, block = setting("merge_clusters", self.points), max(16, power(self.points))
        self.block_r = max(1, chosen["numbers"] // block)
        self.constants = {"BLOCK_R": self.block_r, "BLOCK_P": block, "num_warps": chosen["warps"]}

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, number of rows, distances [B, rows, P]) of one strip after another."""
        for first in range(0, self.points, self.rows):
            rows = min(self.rows, self.points - first)
            apart = strip(self.point, self.square, first, rows) if self.kept is None else self.kept
            self.kept = apart if rows == self.points else None
            yield first, rows, apart

    def launch(self, kernel: Any, group: torch.Tensor, *others: torch.Tensor) -> None:
        """Runs `kernel` over all rows."""
        for first, rows, apart in self:
            kernel[(cdiv(rows, self.block_r), group.shape[0])](
                apart, group, *others, first, rows, self.points, **self.constants
            )


def _grouped(
    values: torch.Tensor, group: torch.Tensor, members: torch.Tensor, per: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(flags of the centres [B, P] int8, number of the centre of each other token [B, P] int64) of a pool."""
    batch, pool = group.shape
    real = group >= 0
    number = torch.minimum(members, members // per + 1)  # [B, N] centres
    share = real.float() / real.sum(1, keepdim=True).clamp(min=1)
    strips = _Strips(torch.where(real[:, :, None], values - share[:, None, :] @ values, 0.0))
    neighbours = torch.where(real, per_token(number, group), 1)
    closest, lead, reach = torch.empty(3, batch, pool, dtype=torch.float32, device=group.device)
    strips.launch(_closest_kernel, group, neighbours, closest)
    density = torch.where(real, (-closest / neighbours).exp(), 0.0)
    strips.launch(_lead_kernel, group, density, lead, reach)
    # Column 0 takes the pads.
    widest = torch.zeros(batch, members.shape[1] + 1, device=group.device)
    widest = widest.scatter_reduce(1, torch.where(real, group + 1, 0), torch.where(real, reach, 0.0), "amax")[:, 1:]
    lead = torch.where(lead < FAR, lead, per_token(widest, group)).sqrt()
    centre = best(density * lead, group, number)
    to = torch.empty_like(group)
    strips.launch(_join_kernel, group, centre, to)
    return centre, to


def supports(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    permille: int,
    per: int,
    room: int,
    slots: int,
) -> Support:
    if any(value.dtype not in FLOATS for value in (feature, size)):
        return no(f"feature and size are {feature.dtype} and {size.dtype}, not float32, float16 or bfloat16")
    if room > MOST_TOKENS:
        return no(f"there is room for {room} tokens in the pool; one program holds {MOST_TOKENS}")
    return YES


def launch(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    permille: int,
    per: int,
    room: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens and of the centres, which stand for their groups."""
    batch, visual = segment.shape
    kept, total = mark(chosen, visual), chosen.shape[1] + slots
    to = torch.full_like(segment, -1)
    stays = kept.to(torch.int8)
    if visual and room and counts.shape[1]:
        left = torch.where(kept, -1, segment)
        dropped = torch.zeros(batch, counts.shape[1] + 1, dtype=torch.int64, device=counts.device)
        dropped = dropped.scatter_add(1, left + 1, torch.ones_like(left))[:, 1:]
        members = torch.minimum(dropped, dropped * permille // 1000 + 1)
        index = packed(best(score, left, members), room)
        group = torch.where(index < 0, -1, per_token(segment, index))
        centre, nearest = _grouped(rows_at(feature.float(), index), group, members, per)
        # Column 0 takes the pads and is cut off.
        spare = torch.zeros(batch, visual + 1, dtype=torch.int64, device=segment.device)
        found = (centre > 0) & (index >= 0)
        stays = stays + spare.scatter(1, index + 1, found.long())[:, 1:].to(torch.int8)
        place = stays.cumsum(1) + (total - 1 - stays.sum(1, keepdim=True))
        into = torch.where(found | (index < 0), -1, per_token(place, per_token(index, nearest)))
        to = (spare - 1).scatter(1, index + 1, into)[:, 1:]
    result = packed(stays, total)
    return result, *merged(feature, size, result, to, "mean")
