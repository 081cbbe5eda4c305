"""scene_cuts: the scenes of a video, cut where successive frames are least alike.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] int64 (-1 pads)
         -> [B, V] int64 number of each token's scene, counted through the sample; -1 pads
Frames:  a frame is the mean of its tokens.
Rule:    a scene ends where the cosine of a frame with the next one of its segment is below `below`, and where it is one
         of the segment's `scenes` - 1 lowest.
Ties:    the earlier frame.   Zeros: what has no direction has cosine 0 with all others.

Reference: FastVID, arXiv 2503.11187 (dynamic segmentation). Deviation: the published frames are the pooled output of a
head of the encoder, which the models do not ship.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.greedy import directions
from tvc.kernels.op import op
from tvc.kernels.peaks import histogram
from tvc.kernels.scene_runs import frame_means, frame_segments, numbered
from tvc.kernels.score_change import frame_cases
from tvc.kernels.segments import ranks


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, _) in frame_cases():
        given = (torch.randn(*frame.shape, 3), segment, counts, frame)
        yield f"{name}-three", (*given, 3, -1.0)
        yield f"{name}-below", (*given, 1, 0.2)
        yield f"{name}-both", (*given, 2, 0.1)
        yield f"{name}-more-than-frames", (*given, 40, -1.0)
    still = dict(frame_cases())["videos"][:3]
    yield "still", (torch.ones(3, 12, 3), *still, 3, 0.5)
    yield "no-direction", (torch.zeros(3, 12, 3), *still, 2, 0.5)


@op(_cases)
def scene_cuts(
    feature: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, frame: torch.Tensor, scenes: int, below: float
) -> torch.Tensor:
    """[B, V] int64: the number of each token's scene."""
    video = frame_segments(segment, frame)
    unit = directions(frame_means(feature, frame))
    one = torch.nn.functional.pad(unit, (0, 0, 1, 0))[:, : unit.shape[1]]
    cosine = ((one * unit) @ torch.ones(unit.shape[2], 1, device=unit.device)).squeeze(2)  # with the frame before
    follows = (video >= 0) & (torch.nn.functional.pad(video, (1, 0), value=-1)[:, : video.shape[1]] == video)
    inside = torch.where(follows, video, -1)
    lowest = ranks(inside, histogram(inside, counts.shape[1]), -cosine) < scenes - 1
    return numbered((video >= 0) & ~(follows & ~(lowest | (cosine < below))), frame)
