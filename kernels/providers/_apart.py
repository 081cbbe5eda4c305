"""Distances of any two tokens, by tiles, symmetric to the last bit, in strips of rows that fit into memory."""

from __future__ import annotations

import torch

from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, fitting, jit, tl


@jit
def _apart_kernel(
    p_point, p_square, p_apart,
    P, D, first, rows, copies, ROOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_a, i_c = first // BLOCK + tl.program_id(0), tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    p_point += i_b * P * D
    p_square += i_b * P
    # Of two tiles the lower one is the left factor, here and in the program for its mirror image.
    o_low = tl.minimum(i_a, i_c) * BLOCK + tl.arange(0, BLOCK)
    o_high = tl.maximum(i_a, i_c) * BLOCK + tl.arange(0, BLOCK)
    b_dot = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        p_x = p_point + o_low.to(tl.int64)[:, None] * D + o_d[None, :]
        p_y = p_point + o_high.to(tl.int64)[None, :] * D + o_d[:, None]
        b_x = tl.load(p_x, mask=(o_low < P)[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK, BLOCK_D]
        b_y = tl.load(p_y, mask=(o_d < D)[:, None] & (o_high < P)[None, :], other=0.0)  # [BLOCK_D, BLOCK]
        b_dot += tl.dot(b_x, b_y, input_precision="ieee")
    b_turned = tl.trans(b_dot)
    b_dot = tl.where(i_a < i_c, b_dot, tl.where(i_a > i_c, b_turned, (b_dot + b_turned) * 0.5))
    o_a = i_a * BLOCK + tl.arange(0, BLOCK)
    o_c = i_c * BLOCK + tl.arange(0, BLOCK)
    b_squares = tl.load(p_square + o_a, mask=o_a < P, other=0.0)[:, None]
    b_squares = b_squares + tl.load(p_square + o_c, mask=o_c < P, other=0.0)[None, :]  # [BLOCK, BLOCK]
    b_apart = tl.maximum(b_squares - 2.0 * b_dot, 0.0)
    b_apart = tl.where(o_a[:, None] == o_c[None, :], 0.0, b_apart)
    if ROOT:
        b_apart = tl.sqrt(tl.where(b_apart < copies * b_squares, 0.0, b_apart))
    else:
        b_apart = b_apart / D
    p_tile = p_apart + (i_b * rows + o_a - first)[:, None] * P + o_c[None, :]
    tl.store(p_tile, b_apart, mask=(o_a < first + rows)[:, None] & (o_c < P)[None, :])


def tile(points: int) -> int:
    """Rows of a tile: strips start at its multiples."""
    chosen = setting("apart", points)
    return fitting(chosen["block"], chosen["block_d"], torch.float32)


def strip(
    point: torch.Tensor, square: torch.Tensor, first: int, rows: int, copies: float | None = None
) -> torch.Tensor:
    """[B, rows, P] float32: distances of the tokens from number `first` on to all of `point [B, P, D]` float32.

    Args:
        point: contiguous; near zero rounding is smallest.
        square: [B, P] float32, contiguous: the squared lengths.
        first: a multiple of `tile(P)`; at least `rows` tokens follow.
        copies: Euclidean distances, 0 where the squared one is below this share of the squared lengths; None: squared
            distances divided by D.
    """
    batch, points, width = point.shape
    block, chosen = tile(points), setting("apart", points)
    apart = torch.empty(batch, rows, points, dtype=torch.float32, device=point.device)
    _apart_kernel[(cdiv(rows, block), cdiv(points, block), batch)](
        point, square, apart, points, width, first, rows, copies or 0.0,
        ROOT=copies is not None, BLOCK=block, BLOCK_D=chosen["block_d"], num_warps=chosen["warps"],
    )  # fmt: skip
    return apart
