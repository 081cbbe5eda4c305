"""How many tokens of a segment stay, for the kernels that take a budget as two integers."""

from __future__ import annotations

from tvc.kernels.providers._triton import jit, tl


@jit
def stays(tokens, permille, count):
    """int32: of `tokens`, as `tvc.kernels.segments.budgets` reads the other two; see `tvc.kernels.portions`."""
    code = tl.where(count < 0, -count, 3000)
    whole = code // 3
    rounding = code - 3 * whole
    scaled = tokens.to(tl.int64) * permille
    below = scaled // whole
    left = scaled - below * whole
    up = (left + whole - 1) // whole
    nearest = (2 * left + below % 2 + whole - 1) // (2 * whole)
    share = below + tl.where(rounding == 0, 0, tl.where(rounding == 1, nearest, up))
    return tl.where(count > 0, tl.minimum(tokens, count), share).to(tl.int32)
