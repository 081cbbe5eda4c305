"""frame_windows: square windows of the frames of a video become one token each, also of several frames together.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame and
         place [B, V] int64 (-1 pads, see frames.py), columns [B, V] int64 from 1 on, the same within a frame
         -> index [B, K] int64 ascending, pads (-1) first; feature [B, K, D] and size [B, K] like the inputs, pads 0;
            K = the most that any sample of the batch is left with (an unbacked size)
Grid:    places 0..columns-1 of a frame are its first row, and so on. Windows lie side by side from its first corner on;
         those at the ends of rows and columns hold what is left over.
Rule:    frames of a segment fall into groups of `group`; windows have `near` tokens a side in the first of each, and
         `far` in the others. Windows reach over `frames` frames after each other, from the segment's first on, with the
         side that they have in the first of them; a frame with other rows than that one's has windows of its own. A
         window becomes its mean, weighted by size, in the place of its first token. Sizes add up, sums are float32; a
         window of one token is that token.

Reference: Visual Context Window Extension, arXiv:2409.20018 (progressive pooling); over several frames: the 3-D pooling
of Slow-Fast video models (a kernel and stride of (4, 1, 1)).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tvc.kernels.frames import extent, first_of, lengths
from tvc.kernels.grid import Gridded
from tvc.kernels.op import Frames, Merging, Scope, Tap, op, primitive
from tvc.kernels.score_change import frame_cases
from tvc.kernels.segments import pack, rows_at
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, given in frame_cases():
        size = torch.randint(1, 4, given[2].shape).float()
        for columns, group, near, far, frames in ((2, 2, 1, 2, 1), (3, 3, 2, 3, 2), (1, 1, 2, 5, 3), (2, 4, 1, 1, 4)):
            label = f"{name}-columns{columns}-group{group}-near{near}-far{far}-frames{frames}"
            rows = torch.full_like(given[2], columns)
            yield label, (torch.randn(*given[2].shape, 3), size, *given, rows, group, near, far, frames)
        rows = given[2].clamp(min=0) % 3 + 1
        for frames in (1, 2):
            yield (
                f"{name}-ragged-frames{frames}",
                (torch.randn(*given[2].shape, 3), size, *given, rows, 2, 1, 2, frames),
            )
    # Frames of 5 x 7 tokens, behind two pads.
    frame = torch.tensor([[-1] * 2 + [t for t in range(4) for _ in range(35)]])
    place = torch.where(frame < 0, -1, torch.cat([torch.zeros(2), torch.arange(35).repeat(4)]).long()[None])
    segment, counts = torch.where(frame < 0, -1, frame // 3), torch.tensor([[105, 35]])
    feature = torch.randn(1, 142, 2)
    rows = torch.full_like(frame, 7)
    given = (feature, torch.ones(1, 142), segment, counts, frame, place, rows)
    yield "odd-grid", (*given, 2, 2, 3, 1)
    yield "odd-grid-frames2", (*given, 2, 2, 3, 2)
    yield "whole-video", (*given, 1, 7, 7, 9)
    yield "all-stay", (*given, 2, 1, 1, 1)


@op(_cases)
def frame_windows(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    columns: torch.Tensor,
    group: int,
    near: int,
    far: int,
    frames: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the windows."""
    valid = segment >= 0
    number = torch.arange(frame.shape[1], device=frame.device).expand(frame.shape)
    first, _ = extent(frame, segment, counts)
    start, long = first_of(frame), lengths(frame)
    opening = torch.where(valid, frame - (frame - first) % frames, frame)
    like = long.gather(1, opening + 1) == long.gather(1, frame + 1)
    like = like & (columns.gather(1, torch.where(valid, start.gather(1, opening + 1), 0)) == columns)
    opening = torch.where(like, opening, frame)
    side = torch.where((opening - first) % group == 0, near, far)
    row, column = place // columns, place % columns
    corner = (row - row % side) * columns + column - column % side
    # A frame's tokens stand side by side.
    leader = torch.where(valid, start.gather(1, opening + 1) + corner, number)
    weight = torch.where(valid, size.float(), 0.0)[:, :, None]
    wide = feature.float()
    index = leader[:, :, None].expand(wide.shape)
    sizes = torch.zeros_like(weight).scatter_add(1, leader[:, :, None], weight)
    summed = torch.zeros_like(wide).scatter_add(1, index, torch.where(valid[:, :, None], wide * weight, 0.0))
    members = torch.zeros_like(leader).scatter_add(1, leader, torch.ones_like(leader))[:, :, None]
    merged = torch.where(members > 1, summed / sizes.clamp(min=1e-12), wide).to(feature.dtype)
    stands = valid & (leader == number)
    kept = pack(stands, largest(stands))
    return kept, rows_at(merged, kept), rows_at(sizes.to(size.dtype), kept).squeeze(2)


@primitive
class FrameWindows(Gridded, Merging):
    """Square windows of a video's frames become one token each; the first frame of a group has smaller ones."""

    key: ClassVar[str] = "frame_windows"
    exact: ClassVar[bool] = False
    components: ClassVar[tuple[str, ...]] = ("language",)
    group: int = Field(gt=0, le=1_000_000, description="frames of a group")
    near: int = Field(gt=0, le=1024, description="tokens of a window's side in the first frame of a group")
    far: int = Field(gt=0, le=1024, description="tokens of a window's side in its other frames")
    frames: int = Field(1, gt=0, le=1_000_000, description="frames after each other that a window reaches over")

    def taps(self) -> dict[str, Tap]:
        return {"frames": Tap("frame"), **super().taps()}

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        scope: Scope,
        frames: tuple[torch.Tensor, torch.Tensor],
        columns: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid = (scope.segment, scope.counts, *frames, self.rows(scope, columns))
        rule = (self.group, self.near, self.far, self.frames)
        made: tuple[Any, Any, Any] = frame_windows.overload(feature, size, *grid, *rule)
        return made

    @property
    def sure(self) -> bool:
        return self.columns is not None

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound, for tokens in frames of any size, down to a single row."""
        columns, side = self.columns or 1, min(self.near, self.far)
        return [min(count, -(-count // columns) * -(-columns // side)) for count in counts]

    def fewest(self, counts: list[int]) -> list[int]:
        side, columns, frames = max(self.near, self.far), self.columns, self.frames
        if columns is None:  # as positions tell: one frame, and no window with tokens left over
            return [-(-count // (side**2 * frames)) for count in counts]
        return [-(-count // columns // (side * frames)) for count in counts]

    def kept_of_frames(self, frames: Frames) -> list[int]:
        """What is left; the upper bound where positions tell how long rows are."""
        if self.columns is None:
            return super().kept_of_frames(frames)
        return [self._windows(scope, self.columns) for scope in frames]

    def _windows(self, frames: Sequence[int], columns: int) -> int:
        """How many windows there are in frames of so many tokens, in rows of `columns`."""
        total = 0
        for number, size in enumerate(frames):
            opening = number - number % self.frames
            if opening < number and frames[opening] == size:
                continue
            side = self.near if number % self.group == 0 else self.far
            # Windows of several rows of tokens, the last of which may be all there is of a window, and not full.
            total += sum(-(-min(columns, size - start) // side) for start in range(0, size, side * columns))
        return total
