"""Plain functions over the frames of videos: where each starts, how long it is, what stands in the frame before.

`frame [B, V]` holds the number of each visual token's frame, counted through the sample in the order of its tokens (an
image is one frame), and `place [B, V]` the token's place in its frame; both are -1 for pads. The tokens of a frame are
side by side. Tables have one row a frame and one more in front, row 0, which takes the pads: as many rows as there are
tokens are always enough.
"""

from __future__ import annotations

import torch

from tvc.kernels.segments import per_token


def table(values: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """[B, V + 1, D] float32: sums of `values [B, V, D]` by frame; row 0 are zeros."""
    values = torch.where((frame >= 0)[:, :, None], values.float(), 0.0)
    made = values.new_zeros(frame.shape[0], frame.shape[1] + 1, values.shape[2])
    return made.scatter_add(1, (frame + 1)[:, :, None].expand(values.shape), values)


def spread(table: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """[B, V, D]: the row of each token's frame in `table [B, F + 1, D]`; row 0 for pads."""
    return table.gather(1, (frame + 1)[:, :, None].expand(-1, -1, table.shape[2]))


def lengths(frame: torch.Tensor) -> torch.Tensor:
    """[B, V + 1] int64: tokens of each frame, row 0 those of none."""
    made = torch.zeros(frame.shape[0], frame.shape[1] + 1, dtype=torch.int64, device=frame.device)
    return made.scatter_add(1, frame + 1, torch.ones_like(frame))


def first_of(number: torch.Tensor) -> torch.Tensor:
    """[B, V + 1] int64: the first slot of each number of `number [B, V]` in row number + 1, row 0 that of -1.

    Rows of numbers that are not there hold V. Pads may stand in front or behind.
    """
    slot = torch.arange(number.shape[1], device=number.device).expand(number.shape)
    made = torch.full_like(torch.nn.functional.pad(number, (1, 0)), number.shape[1])
    return made.scatter_reduce(1, number + 1, slot, "amin")


def extent(frame: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, V] first frame of each token's segment, [B, V] how many frames it has); what pads get means nothing."""
    size = (counts.shape[0], counts.shape[1] + 1)
    where = segment + 1  # column 0 takes the pads
    last = torch.full(size, -1, dtype=torch.int64, device=frame.device).scatter_reduce(1, where, frame, "amax")[:, 1:]
    # The first frame is the last of the numbers counted backwards.
    behind = frame.shape[1] - frame
    first = torch.full(size, -1, dtype=torch.int64, device=frame.device).scatter_reduce(1, where, behind, "amax")
    first = frame.shape[1] - first[:, 1:]
    return per_token(first, segment), per_token(last - first + 1, segment)


def same_place(
    frame: torch.Tensor, place: torch.Tensor, other: torch.Tensor, segment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at each token's place in the frame `other [B, V]` (-1: none), all frames being complete.

    Returns:
        [B, V] int64 its index along V, 0 where there is none; [B, V] bool whether there is one in the same segment.
    """
    numbers, begin = lengths(frame), first_of(frame)
    there = (frame >= 0) & (other >= 0) & (place < numbers.gather(1, other + 1))
    index = torch.where(there, begin.gather(1, other + 1) + place, 0)
    return index, there & (segment.gather(1, index) == segment)
