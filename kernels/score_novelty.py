"""novelty_score: how unlike each visual token is to its frame and to all frames so far.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] int64 (-1 pads),
         total [B, D] float and frames [B] int64, or neither -> [B, V] float32, pads 0
Rule:    of each frame the D // 2 channels (one at least) with the lowest variance over its tokens count, the others are
         0. With the token's direction x, the mean f of the directions of its frame's tokens and the direction m of the
         mean of all frames' mean tokens up to this one: the score is - G(x, f) - G(x, m), where
         G(a, b) = sum over w in 1/8, 1/4, 1/2, 1, 2 of exp(-|a - b|^2 / (2 w)).
Frames:  without `total` those of the token's segment; with it all of the sample, whatever their segments, and in front
         of them `frames` earlier ones, the sum of whose mean tokens it is.
Ties:    of equally varying channels the lower index counts.   Zeros: what has no direction is 0.
Memory:  O(B V D).

Reference: STC (streaming token compression), its pruner, with frames as chunks. Deviation: the memory is of all
channels, of which those of the current frame are compared; the published one averages a different half for each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.frame_memory import frame_memory
from tvc.kernels.frames import extent, lengths, spread, table
from tvc.kernels.greedy import directions
from tvc.kernels.op import Scope, Score, State, Tap, op, primitive
from tvc.kernels.score_change import frame_cases

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
MEMORY = (State("total", ("width",), torch.float32), State("frames", (), torch.int64))  # what `frame_memory` gives


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, _) in frame_cases():
        for width in (1, 6, 7):
            yield f"{name}-D{width}", (torch.randn(*frame.shape, width), segment, counts, frame)
    videos = dict(frame_cases())["videos"]
    yield "all-equal", (torch.ones(3, 12, 6), *videos[:3])
    yield "no-direction", (torch.zeros(3, 12, 6), *videos[:3])
    for name, (segment, counts, frame, _) in frame_cases():
        earlier = torch.arange(len(frame)) * 3  # the first sample's are its first
        total = torch.randn(len(frame), 7) * earlier[:, None]
        yield f"{name}-remembered", (torch.randn(*frame.shape, 7), segment, counts, frame, total, earlier)


@op(_cases)
def novelty_score(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    total: torch.Tensor | None = None,
    frames: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, V] float32: the higher, the less alike to its frame and to the frames so far."""
    channels = feature.shape[2]
    feature = torch.where((frame >= 0)[:, :, None], feature.float(), 0.0)
    number = lengths(frame).clamp(min=1)[:, :, None]
    mean = table(feature, frame) / number  # [B, V + 1, D]
    varies = table((feature - spread(mean, frame)).square(), frame) / number
    order = torch.sort(varies, dim=2, stable=True).indices
    place = torch.zeros_like(order).scatter(2, order, torch.arange(channels, device=order.device).expand(order.shape))
    counted = (place < max(1, channels // 2)).float()

    own = spread(counted, frame)
    unit = directions(feature * own)
    middle = spread(table(unit, frame) / number, frame)
    sums = mean.cumsum(1)
    so_far, seen = spread(sums, frame), frame + 1
    if total is None or frames is None:
        # Sums over the frames of a segment: those up to here less those in front of it.
        first = extent(frame, segment, counts)[0]
        first = torch.where(frame >= 0, first, 0)
        so_far, seen = so_far - sums.gather(1, first[:, :, None].expand(feature.shape)), seen - first
    else:
        so_far, seen = so_far + total.float()[:, None], seen + frames[:, None]
    memory = directions(so_far / seen.clamp(min=1)[:, :, None].float() * own)

    ones = torch.ones(channels, 1, device=feature.device)
    score = torch.zeros_like(segment, dtype=torch.float32)
    for other in (middle, memory):
        apart = ((unit - other).square() @ ones).squeeze(2)
        for width in WIDTHS:
            score = score - (-apart / (2.0 * width)).exp()
    return torch.where(frame >= 0, score, 0.0)


@primitive
class NoveltyScore(Score):
    """How unlike a token of a video is to the others of its frame and to the frames so far."""

    key: ClassVar[str] = "novelty"
    scoped: ClassVar[bool] = True
    memory: Literal["call", "conversation"] = Field(
        "call",
        description="whose frames are those so far: call, of the token's own image or video, or of its scope; or "
        "conversation, all that its sample has shown since its cache was empty",
    )

    def taps(self) -> dict[str, Tap]:
        asked = {"feature": Tap("feature"), "frames": Tap("frame")}
        return asked | ({"past": Tap("memory", states=MEMORY)} if self.memory == "conversation" else {})

    def apply(
        self,
        scope: Scope,
        feature: torch.Tensor,
        frames: tuple[torch.Tensor, torch.Tensor],
        past: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        before = () if past is None else (past["total"], past["frames"])
        return novelty_score.overload(feature, scope.segment, scope.counts, frames[0], *before)

    def remembered(
        self, feature: torch.Tensor, frames: tuple[torch.Tensor, torch.Tensor], past: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        total, number = frame_memory.overload(feature, frames[0], past["total"], past["frames"])
        return {"total": total, "frames": number}
