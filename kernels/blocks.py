"""by_rows: the rows of a large matrix, a block at a time, so that the matrix itself is never in memory.

What is asked of a matrix of queries by keys, or of tokens by tokens, is mostly one number for each row or each column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tvc.kernels.loop import State, repeat

BLOCK = 256  # rows in memory at once
UNROLLED = 4  # blocks of a known number of rows that a graph holds side by side, in the place of a loop


def by_rows(body: Callable[..., State], state: State, over: torch.Tensor) -> State:
    """What `state` is after `state = body(at, new, *state)` for each block of rows, in order.

    Args:
        body: as for `repeat`; `at [B, b]` int64 are the rows of a block and `new [b]` bool is False for rows that were
            in it before: where only the run tells how many rows there are, the last block repeats the last row.
        state: as for `repeat`.
        over: [B, R, ...] tells by its shape how many samples and rows there are, maybe none, and by its device where.
    """
    batch, rows, device = over.shape[0], over.shape[1], over.device
    # The body of a loop is traced by Dynamo, to which a size that only the run tells is an int as well.
    known = isinstance(rows, int) and not torch.compiler.is_dynamo_compiling()
    if known and (rows <= UNROLLED * BLOCK or not torch.compiler.is_exporting()):
        for start in range(0, rows, BLOCK):
            at = torch.arange(start, min(start + BLOCK, rows), device=device)
            state = body(at.expand(batch, -1), at >= 0, *state)
        return state
    # As many rows as there are, where that is fewer: a decode step may ask for one.
    within = torch.arange(torch.sym_min(rows, BLOCK), device=device)

    def block(number: torch.Tensor, *now: torch.Tensor) -> State:
        # A loop takes no size from around it that only the run tells, but any tensor.
        at = number * BLOCK + within
        return body(at.clamp(max=over.shape[1] - 1).expand(over.shape[0], -1), at < over.shape[1], *now)

    return repeat(block, state, torch.full((), 1, dtype=torch.int64, device=device) * ((rows + BLOCK - 1) // BLOCK))
