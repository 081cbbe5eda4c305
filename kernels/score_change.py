"""change_score: how much each visual token differs from the one at the same place of an earlier frame.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] and place [B, V]
         int64 (-1 pads) -> [B, V] float32
Rule:    1 - cosine with the token of the earlier frame; NEW, more than any difference, for a token without one: in the
         first frame of its segment, and where the earlier frame is shorter. Pads get 0.
Earlier: with window 0 the frame before. With a window of 2 or more a segment's frames fall into groups of that many;
         the first of each has no earlier frame, one at an odd place has the frame before it, the others the one two
         before it.
Zeros:   what has no direction differs by 1.

Reference: EVS (efficient video sampling) of vLLM, window 0; DyCoke, arXiv 2411.15024, window 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.frames import extent, same_place
from tvc.kernels.greedy import directions, rows
from tvc.kernels.op import Scope, Score, Tap, op, primitive

NEW = 255.0


def frame_cases() -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """(name, (segment, counts, frame, place)) of videos and images of odd sizes, some of them side by side."""
    segment = torch.tensor([[-1, -1, *[0] * 6, *[1] * 4], [0] * 12, [-1, 0, *[1] * 10]])
    counts = torch.tensor([[6, 4], [12, 0], [1, 10]])
    frame = torch.tensor(
        [
            [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3],
            [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
            [-1, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
        ]
    )
    place = torch.tensor([[-1, -1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3], [0, 1] * 6, [-1, 0, *[0, 1] * 5]])
    yield "videos", (segment, counts, frame, place)
    # Frames of unequal lengths, as images are; pads behind, as where a prompt begins.
    several = torch.tensor([[0] * 10 + [-1] * 2, [*[0] * 3, *[1] * 7, -1, -1], [0] * 12])
    numbers = [[0] * 3 + [1] * 5 + [2] * 2, [0, 0, 0, *[1] * 3, *[2] * 4], [0, *[1] * 4, *[2] * 7]]
    ragged = torch.tensor([[*row, *[-1] * (12 - len(row))] for row in numbers])
    inside = torch.tensor([[row[:i].count(n) for i, n in enumerate(row)] + [-1] * (12 - len(row)) for row in numbers])
    yield "pads-behind", (several, torch.tensor([[10, 0], [3, 7], [12, 0]]), ragged, inside)
    images = (torch.where(segment < 0, -1, 0), counts.sum(1, keepdim=True), frame, place)
    yield "images-as-frames", images
    alone = (torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[5]]), torch.arange(5)[None], torch.zeros(1, 5).long())
    yield "one-token-frames", alone
    single = (*alone[:2], torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None])
    yield "one-frame", single
    one = torch.zeros(1, 1, dtype=torch.int64)
    yield "one-token", (one, one + 1, one, one)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    yield "no-visual-token", (nothing, torch.zeros(2, 1, dtype=torch.int64), nothing, nothing)


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, frames in frame_cases():
        batch, tokens = frames[0].shape
        for window in (0, 2, 4):
            yield f"{name}-window{window}", (torch.randn(batch, tokens, 6), *frames, window)
    videos = dict(frame_cases())["videos"]
    yield "still", (torch.ones(3, 12, 6), *videos, 4)
    yield "no-direction", (torch.zeros(3, 12, 6), *videos, 0)


def earlier(
    segment: torch.Tensor, counts: torch.Tensor, frame: torch.Tensor, place: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, V] int64 the token that each one is compared with, 0 without one; [B, V] bool whether there is one)."""
    other = frame - 1
    if window > 0:
        number = (frame - extent(frame, segment, counts)[0]).clamp(min=0) % window
        other = torch.where(number == 0, -1, frame - 2 + number % 2)
    return same_place(frame, place, torch.where(frame < 0, -1, other), segment)


@op(_cases)
def change_score(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """[B, V] float32: 1 - cosine with the token at the same place of an earlier frame of the segment."""
    index, there = earlier(segment, counts, frame, place, window)
    unit = directions(feature)
    # A sum along D as a matrix product: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(feature.shape[2], 1, device=feature.device)
    cosine = ((unit * rows(unit, index)) @ ones).squeeze(2)
    return torch.where(there, 1.0 - cosine, torch.where(frame < 0, 0.0, NEW))


@primitive
class ChangeScore(Score):
    """How much a token of a video differs from the one at the same place of an earlier frame."""

    key: ClassVar[str] = "change"
    shorthand: ClassVar[str | None] = "window"
    scoped: ClassVar[bool] = True
    window: int = Field(0, ge=0, description="frames of a group whose first one is compared with none; 0: no groups")

    def taps(self) -> dict[str, Tap]:
        return {"feature": Tap("feature"), "frames": Tap("frame")}

    def apply(self, scope: Scope, feature: torch.Tensor, frames: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return change_score.overload(feature, scope.segment, scope.counts, *frames, self.window)
