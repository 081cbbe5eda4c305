"""frames_keep: a budget for each frame of a video, or one for the video that no single frame is too small for.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] int64 (-1 pads)
         -> [B, K] int64 ascending, pads (-1) first; K = the most that any sample of the batch keeps (an unbacked size)
Budget:  `count` tokens where count > 0, else a share of them (portions.py), but one at least: of each frame;
         or, `together`, of each segment, whose largest frame is the least that it keeps. The best-scored stay.
Window:  with a window of 2 or more a segment's frames fall into groups of that many; the first of each stays whole.
Ends:    with `open_ends` (and a window) every other frame of the last group stays whole from the second last frame on,
         and the last frame of an odd number of frames goes, unless it is the only one.
Ties:    the lower index wins.   NaN: counts as the lowest score.

Reference: EVS of vLLM (together), DyCoke, arXiv 2411.15024 (window 4; the published loop leaves its ends open), STC
(per frame). Deviation: DyCoke's published code fails for four frames or fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from tvc.kernels.budget import Budget
from tvc.kernels.frames import extent, lengths
from tvc.kernels.op import Frames, Scope, Select, Tap, op, primitive
from tvc.kernels.score_change import frame_cases
from tvc.kernels.segments import budgets, pack, per_token, ranks
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, _) in frame_cases():
        given = (torch.randn(frame.shape), segment, counts, frame)
        yield f"{name}-half-of-frames", (*given, 500, 0, False, 0, False)
        yield f"{name}-one-of-frames", (*given, 0, 1, False, 0, False)
        yield f"{name}-window", (*given, 500, 0, False, 4, False)
        yield f"{name}-open-ends", (*given, 500, 0, False, 4, True)
        yield f"{name}-together", (*given, 250, 0, True, 0, False)
        yield f"{name}-count-together", (*given, 0, 5, True, 0, False)
    videos = dict(frame_cases())["videos"]
    equal = (torch.zeros(3, 12), *videos[:3])
    yield "equal-scores", (*equal, 600, 0, True, 0, False)
    yield "equal-scores-of-frames", (*equal, 0, 1, False, 4, True)
    yield "keep-all", (*equal, 1000, 0, True, 2, True)
    score = torch.randn(3, 12)
    yield "nan", (score.masked_fill(score > 0.4, float("nan")), *videos[:3], 500, 0, False, 4, False)
    for number in (1, 2, 3, 4, 5, 7, 9):
        frame = torch.arange(number).repeat_interleave(3)[None]
        whole = (torch.randn(1, 3 * number), torch.zeros_like(frame), torch.tensor([[3 * number]]), frame)
        yield f"open-ends-of-{number}-frames", (*whole, 340, 0, False, 4, True)


@op(_cases)
def frames_keep(
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    permille: int,
    count: int,
    together: bool,
    window: int,
    open_ends: bool,
) -> torch.Tensor:
    """[B, K] int64: the tokens that stay; K is the largest number of a sample."""
    valid, score = segment >= 0, score.float()
    score = torch.where(torch.isnan(score), torch.finfo(torch.float32).min, score)
    numbers = lengths(frame)
    first, frames = extent(frame, segment, counts)
    place = torch.where(valid, frame - first, 0)
    # As segments of their own, frames have a budget each.
    budget = budgets(numbers[:, 1:], permille, count).clamp(min=1)
    keep = valid & (ranks(frame, numbers[:, 1:], score) < per_token(budget, frame))
    if together:
        own = numbers.gather(1, frame + 1)
        most = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.int64, device=counts.device)
        most = most.scatter_reduce(1, segment + 1, torch.where(valid, own, 0), "amax")[:, 1:]
        shared = torch.maximum(budgets(counts, permille, count), most)
        keep = valid & (ranks(segment, counts, score) < per_token(shared, segment))
    if window > 0:
        keep = keep | (valid & (place % window == 0))
        if open_ends:
            keep = keep | (valid & (place % 2 == 0) & (place >= frames - 2))
            keep = keep & ~((place == frames - 1) & (frames % 2 == 1) & (frames > 1))
    return pack(keep, largest(keep))


@primitive
class FrameSelect(Select):
    """The best-scored tokens of each frame of a video stay, or those of the video, one frame's worth at least."""

    key: ClassVar[str] = "frames"
    shorthand: ClassVar[str | None] = "keep"
    exact: ClassVar[bool] = False
    keep: Budget = Field(description="what stays of each frame, or of all frames of a scope together")
    together: bool = Field(False, description="whether the frames of a scope share the budget")
    window: int = Field(0, ge=0, description="frames of a group whose first one stays whole; 0: no groups")
    bug_compatible: bool = Field(
        False, description="whether the last group is half done and an odd last frame goes, as in DyCoke's code"
    )

    @model_validator(mode="after")
    def _groups(self) -> FrameSelect:
        if self.bug_compatible and not self.window:
            raise ValueError("bug_compatible is about groups of frames: give a window")
        return self

    def taps(self) -> dict[str, Tap]:
        return {"frames": Tap("frame")}

    def apply(
        self, score: torch.Tensor | None, scope: Scope, frames: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        rule = (*self.keep.numbers, self.together, self.window, self.bug_compatible)
        return frames_keep.overload(score, scope.segment, scope.counts, frames[0], *rule)

    @property
    def sure(self) -> bool:
        # How many of the best of a scope are in frames that stay whole anyway, only the run tells.
        return not (self.together and self.window)

    def kept(self, counts: list[int]) -> list[int]:
        """What stays where each scope is one frame, as an image is."""
        return self.kept_of_frames([[count] for count in counts])

    def kept_of_frames(self, frames: Frames) -> list[int]:
        """What stays; the upper bound where frames share a budget and some stay whole."""
        return [self._kept(scope) for scope in frames]

    def _kept(self, frames: Sequence[int]) -> int:
        number = len(frames)
        shared = max(self.keep.kept(sum(frames)), max(frames, default=0)) if self.together else 0
        total = shared
        for place, size in enumerate(frames):
            whole = self.window > 0 and place % self.window == 0
            if self.bug_compatible:
                whole |= place >= number - 2 and place % 2 == 0
                if place == number - 1 > 0 and number % 2 == 1:
                    continue  # the last of an odd number of frames goes
            if whole:
                total += size
            elif not self.together:
                total += min(size, max(1, self.keep.kept(size)))
        return min(sum(frames), total)
