"""every_keep: every n-th frame of a video stays whole, and the others go.

Shapes:  segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] int64 (-1 pads, see frames.py)
         -> [B, K] int64 ascending, pads (-1) first; K = the most that any sample of the batch keeps (an unbacked size)
Rule:    of the frames of a segment those numbered 0, `step`, 2 `step`, ... from its first on.

Reference: the subsampling of frames that every method for videos is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.frames import extent
from tvc.kernels.op import Frames, Scope, Select, Tap, op, primitive
from tvc.kernels.score_change import frame_cases
from tvc.kernels.segments import pack
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    for name, (segment, counts, frame, _) in frame_cases():
        for step in (1, 2, 3, 100):
            yield f"{name}-step{step}", (segment, counts, frame, step)


@op(_cases)
def every_keep(segment: torch.Tensor, counts: torch.Tensor, frame: torch.Tensor, step: int) -> torch.Tensor:
    """[B, K] int64: the tokens of the frames that stay; K is the largest number of a sample."""
    first, _ = extent(frame, segment, counts)
    keep = (segment >= 0) & ((frame - first) % step == 0)
    return pack(keep, largest(keep))


@primitive
class Every(Select):
    """Every n-th frame of a video stays whole; no score is needed."""

    key: ClassVar[str] = "every"
    shorthand: ClassVar[str | None] = "frames"
    exact: ClassVar[bool] = False
    needs_score: ClassVar[bool] = False
    frames: int = Field(ge=1, le=1_000_000, description="from one frame that stays to the next")

    def taps(self) -> dict[str, Tap]:
        return {"frames": Tap("frame")}

    def apply(
        self, score: torch.Tensor | None, scope: Scope, frames: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        return every_keep.overload(scope.segment, scope.counts, frames[0], self.frames)

    @property
    def sure(self) -> bool:
        return True

    def kept(self, counts: list[int]) -> list[int]:
        """All of them: what each scope has are the tokens of one frame."""
        return list(counts)

    def kept_of_frames(self, frames: Frames) -> list[int]:
        return [sum(scope[:: self.frames]) for scope in frames]
