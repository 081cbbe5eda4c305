"""frame_memory: the frames that samples have shown so far, as the sum of their mean tokens, a chunk's added.

Shapes:  feature [B, V, D] float, frame [B, V] int64 (-1 pads), total [B, D] float, frames [B] int64
         -> total [B, D] float32, frames [B] int64
Rule:    every frame of the chunk adds the mean of its tokens to the sum, and one to the number.

Reference: STC (streaming token compression), the list of mean tokens that its pruner takes the mean of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.frames import lengths, table
from tvc.kernels.op import op
from tvc.kernels.score_change import frame_cases


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (_, _, frame, _) in frame_cases():
        for width in (1, 7):
            memory = (torch.randn(len(frame), width), torch.arange(len(frame)) * 5)
            yield f"{name}-D{width}", (torch.randn(*frame.shape, width), frame, *memory)
    some = torch.tensor([[-1, -1, -1], [-1, 0, 1]])
    yield "one-without-frames", (torch.randn(2, 3, 4), some, torch.randn(2, 4), torch.tensor([2, 0]))


@op(_cases)
def frame_memory(
    feature: torch.Tensor, frame: torch.Tensor, total: torch.Tensor, frames: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total [B, D] float32, frames [B] int64) of what was there and the chunk."""
    number = lengths(frame)
    mean = table(feature, frame) / number.clamp(min=1)[:, :, None]  # row 0, of pads, are zeros
    return total.float() + mean.sum(1), frames + (number[:, 1:] > 0).sum(1)
