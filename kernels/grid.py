"""Plain functions over the grids of pictures: which token stands to the right of each visual token, and which below.

Both answers are `(right, below)`, each [B, V] int64: a place along V, -1 where the picture (or the frame) ends and for
pads. Where every token is still there, tokens follow each other row by row.
"""

from __future__ import annotations

import torch

from tvc.kernels.segments import per_token, ranks

Neighbours = tuple[torch.Tensor, torch.Tensor]


def neighbours_by_position(positions: torch.Tensor, segment: torch.Tensor) -> Neighbours:
    """From where tokens stand: `positions [3, B, V]` on the axes of time, rows and columns; `segment [B, V]`, -1 pads.

    A token's right neighbour is the next one, if it stands in the same row and one column further. A row is a run of
    such tokens, and the token below the one that comes as many places later, if it stands one row further.
    """
    tokens = segment.shape[1]
    slot = torch.arange(tokens, device=segment.device).expand(segment.shape)

    def there(step: torch.Tensor, time: int, row: int, column: int) -> torch.Tensor:
        """[B, V] bool: whether the token `step [B, V]` places on is of the same picture, and stands that far away."""
        index = torch.minimum(slot + step, torch.full_like(slot, tokens) - 1)
        apart = positions.gather(2, index.expand(positions.shape)) - positions
        inside = (segment >= 0) & (slot + step < tokens) & (segment.gather(1, index) == segment)
        return inside & (apart[0] == time) & (apart[1] == row) & (apart[2] == column)

    one = torch.ones_like(slot)
    right = there(one, 0, 0, 1)
    run = (~torch.nn.functional.pad(right, (1, 0))[:, :tokens]).long().cumsum(1)
    length = torch.zeros_like(torch.nn.functional.pad(slot, (1, 0))).scatter_add(1, run, one).gather(1, run)
    below = there(length, 0, 1, 0)
    return torch.where(right, slot + 1, -1), torch.where(below, slot + length, -1)


def neighbours_by_columns(segment: torch.Tensor, counts: torch.Tensor, columns: int) -> Neighbours:
    """From the length of a row: places 0..columns-1 of a segment are its first row, and so on; the last may be short.

    Args:
        segment: [B, V] int64, -1 pads; a segment's tokens stand side by side.
        counts: [B, N] int64 tokens of each segment.
    """
    slot = torch.arange(segment.shape[1], device=segment.device).expand(segment.shape)
    place, size = ranks(segment, counts), per_token(counts, segment)
    right = (segment >= 0) & (place % columns < columns - 1) & (place + 1 < size)
    below = (segment >= 0) & (place + columns < size)
    return torch.where(right, slot + 1, -1), torch.where(below, slot + columns, -1)
