"""scene_runs: the scenes of a video, as clusters of frames that are cut down to runs.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] int64 (-1 pads)
         -> [B, V] int64 number of each token's scene, counted through the sample; -1 pads
Frames:  a frame is the mean of its tokens.
Rule:    the T frames of a segment fall into max(1, T * permille // 1000) clusters by density peaks (kernels/peaks.py).
         Of each cluster the longest runs of successive frames stay, unless they are single frames. Every other stretch
         of frames goes to the longer of the two runs beside it, to the earlier one of equals. A segment where no run
         stays is one scene.

Reference: PruneVID, arXiv 2412.16117.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.frames import lengths, spread, table
from tvc.kernels.op import op
from tvc.kernels.peaks import centres, histogram
from tvc.kernels.score_change import frame_cases


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, _) in frame_cases():
        given = (torch.randn(*frame.shape, 5), segment, counts, frame)
        yield f"{name}-quarter", (*given, 250, 7)
        yield f"{name}-half", (*given, 500, 2)
        yield f"{name}-all", (*given, 1000, 1)
    for frames, seed in ((9, 1), (16, 2), (24, 3)):
        torch.manual_seed(seed)
        steps = torch.randn(1, frames, 1, 4) * (torch.rand(1, frames, 1, 1) > 0.6)
        feature = (steps.cumsum(1) + 0.05 * torch.randn(1, frames, 2, 4)).flatten(1, 2)
        frame = torch.arange(frames).repeat_interleave(2)[None]
        yield f"film{frames}", (feature, torch.zeros_like(frame), torch.tensor([[2 * frames]]), frame, 250, 3)
    still = dict(frame_cases())["videos"][:3]
    yield "still", (torch.ones(3, 12, 5), *still, 500, 7)


def frame_segments(segment: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """[B, V] int64: the segment of frame 0, frame 1, ...; -1 behind the last one."""
    room = torch.full((frame.shape[0], frame.shape[1] + 1), -1, dtype=torch.int64, device=frame.device)
    return room.scatter_reduce(1, frame + 1, segment, "amax")[:, 1:]


def frame_means(feature: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """[B, V, D] float32: the mean token of frame 0, frame 1, ...; zeros behind the last one."""
    return (table(feature, frame) / lengths(frame).clamp(min=1)[:, :, None])[:, 1:]


def of_tokens(values: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """[B, V]: the entry of `values [B, F]` at each token's frame; -1 for pads."""
    return torch.where(frame < 0, -1, spread(torch.nn.functional.pad(values, (1, 0))[:, :, None], frame).squeeze(2))


def numbered(begins: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """[B, V] int64: the scene of each token where scenes begin at the frames of `begins [B, F]` bool."""
    return of_tokens(begins.long().cumsum(1) - 1, frame)


def _fake(feature: torch.Tensor, segment: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(segment)


@op(_cases, fake=_fake)
def scene_runs(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    permille: int,
    neighbours: int,
) -> torch.Tensor:
    """[B, V] int64: the number of each token's scene."""
    video = frame_segments(segment, frame)
    frames = histogram(video, counts.shape[1])
    number = torch.minimum(frames, (frames * permille // 1000).clamp(min=1))
    k = torch.full_like(frames, neighbours)
    _, cluster = centres(frame_means(feature, frame), video, frames, number, k, neighbours)
    real = video >= 0
    # Clusters are known by the frame that is their centre, so that no two videos share one.
    begins = real & ((_before(cluster, -2) != cluster) | (_before(video, -2) != video))

    size = feature.shape[1]
    run = torch.where(real, begins.long().cumsum(1) - 1, -1)
    length = _at(histogram(run, size), run)
    longest = torch.zeros(video.shape[0], size + 1, dtype=torch.int64, device=video.device)
    longest = longest.scatter_reduce(1, torch.where(real, cluster + 1, 0), length, "amax")[:, 1:]
    stays = real & (length == _at(longest, torch.where(real, cluster, -1))) & (length > 1)

    # The runs that stay, counted through the sample; a frame that is in none lies behind the `left`-th of them.
    left = (stays & begins).long().cumsum(1) - 1
    room = torch.full((video.shape[0], size + 1), -1, dtype=torch.int64, device=video.device)
    to = torch.where(stays & begins, left + 1, 0)
    nothing = torch.full_like(video, -1)
    of_run = room.scatter(1, to, torch.where(stays & begins, video, nothing))[:, 1:]
    long = room.scatter(1, to, torch.where(stays & begins, length, nothing))[:, 1:]
    # Column `size` stands for no run at all.
    of_run, long = (torch.nn.functional.pad(values, (0, 1), value=-1) for values in (of_run, long))
    one, other = torch.where(left < 0, size, left), (left + 1).clamp(max=size)
    first = torch.where(of_run.gather(1, one) == video, long.gather(1, one), 0)
    second = torch.where(of_run.gather(1, other) == video, long.gather(1, other), 0)
    joined = torch.where(stays | (first >= second), left, left + 1)
    joined = torch.where(real & ((first > 0) | (second > 0)), joined, -1)
    return numbered(real & ((_before(joined, -2) != joined) | (_before(video, -2) != video)), frame)


def _before(values: torch.Tensor, first: int) -> torch.Tensor:
    """[B, F]: each entry moved one place on, `first` in front."""
    return torch.nn.functional.pad(values, (1, 0), value=first)[:, : values.shape[1]]


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [B, F] at index [B, F] (-1: 0)."""
    return torch.nn.functional.pad(values, (1, 0)).gather(1, index + 1)
