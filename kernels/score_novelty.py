"""novelty_score: how unlike each visual token is to its frame and to all frames so far.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] int64 (-1 pads)
         -> [B, V] float32, pads 0
Rule:    of each frame the D // 2 channels (one at least) with the lowest variance over its tokens count, the others are
         0. With the token's direction x, the mean f of the directions of its frame's tokens and the direction m of the
         mean of all frames' mean tokens up to this one: the score is - G(x, f) - G(x, m), where
         G(a, b) = sum over w in 1/8, 1/4, 1/2, 1, 2 of exp(-|a - b|^2 / (2 w)).
Ties:    of equally varying channels the lower index counts.   Zeros: what has no direction is 0.
Memory:  O(B V D).

Reference: STC (streaming token compression), its pruner, with frames as chunks. Deviation: the memory is of all
channels, of which those of the current frame are compared; the published one averages a different half for each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.kernels.frames import extent, lengths, spread, table
from tvc.kernels.greedy import directions
from tvc.kernels.op import Scope, Score, Tap, op, primitive
from tvc.kernels.score_change import frame_cases

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, _) in frame_cases():
        for width in (1, 6, 7):
            yield f"{name}-D{width}", (torch.randn(*frame.shape, width), segment, counts, frame)
    videos = dict(frame_cases())["videos"]
    yield "all-equal", (torch.ones(3, 12, 6), *videos[:3])
    yield "no-direction", (torch.zeros(3, 12, 6), *videos[:3])


@op(_cases)
def novelty_score(
    feature: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, frame: torch.Tensor
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
    # Sums over the frames of a segment: those up to here less those in front of it.
    total = mean.cumsum(1)
    first = extent(frame, segment, counts)[0]
    first = torch.where(frame >= 0, first, 0)
    so_far = spread(total, frame) - total.gather(1, first[:, :, None].expand(feature.shape))
    seen = (frame - first + 1).clamp(min=1)[:, :, None].float()
    memory = directions(so_far / seen * own)

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

    def taps(self) -> dict[str, Tap]:
        return {"feature": Tap("feature"), "frames": Tap("frame")}

    def apply(self, scope: Scope, feature: torch.Tensor, frames: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return novelty_score.overload(feature, scope.segment, scope.counts, frames[0])
