"""scene_windows: the scenes of a video that save most tokens when places that stand still are kept once a scene.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame [B, V] and place [B, V]
         int64 (-1 pads) -> [B, V] int64 number of each token's scene, counted through the sample; -1 pads
Rule:    a place stands still from a frame to the next if the cosine of its tokens is above `above`. A window of w >= 2
         successive frames saves w - 1 times the number of places that stand still all through it. Of all divisions into
         windows of `longest` frames at most, frames outside windows being scenes of their own, the one that saves most.
Ties:    found frame by frame: what ends with a frame of its own, then with the shortest window.

Reference: HoliTom, arXiv 2505.21334 (static windows by dynamic programming).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.frames import same_place
from tvc.kernels.greedy import directions, rows
from tvc.kernels.loop import State, repeat
from tvc.kernels.op import op
from tvc.kernels.peaks import histogram
from tvc.kernels.scene_runs import frame_segments, numbered
from tvc.kernels.score_change import frame_cases


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, place) in frame_cases():
        feature = torch.randn(*frame.shape, 3)
        for above, longest in ((0.2, 1024), (-0.5, 3), (0.9, 8)):
            yield f"{name}-above{above:g}-longest{longest}", (feature, segment, counts, frame, place, above, longest)
    videos = dict(frame_cases())["videos"]
    yield "still", (torch.ones(3, 12, 3), *videos, 0.9, 1024)
    yield "still-in-pairs", (torch.ones(3, 12, 3), *videos, 0.9, 2)
    for frames, seed in ((7, 1), (12, 2), (20, 3)):
        torch.manual_seed(seed)
        steps = torch.randn(1, frames, 5, 3) * (torch.rand(1, frames, 5, 1) > 0.5)
        frame = torch.arange(frames).repeat_interleave(5)[None]
        film = (steps.cumsum(1).flatten(1, 2), torch.zeros_like(frame), torch.tensor([[5 * frames]]), frame)
        yield f"film{frames}", (*film, torch.arange(5).repeat(frames)[None], 0.8, 1024)


def still_since(
    feature: torch.Tensor, segment: torch.Tensor, frame: torch.Tensor, place: torch.Tensor, above: float
) -> torch.Tensor:
    """[B, V] int64: through how many steps from frame to frame each token's place has stood still, up to its frame."""
    index, there = same_place(frame, place, torch.where(frame < 0, -1, frame - 1), segment)
    unit = directions(feature)
    ones = torch.ones(feature.shape[2], 1, device=feature.device)
    still = there & (((unit * rows(unit, index)) @ ones).squeeze(2) > above)

    def step(number: torch.Tensor, since: torch.Tensor) -> State:
        return (torch.where(still & (frame == number + 1), since.gather(1, index) + 1, since),)

    last = torch.nn.functional.pad(frame, (1, 0)).amax((0, 1))
    return repeat(step, (torch.zeros_like(segment),), last)[0]


def _fake(feature: torch.Tensor, segment: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(segment)


@op(_cases, fake=_fake)
def scene_windows(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    above: float,
    longest: int,
) -> torch.Tensor:
    """[B, V] int64: the number of each token's scene."""
    since = still_since(feature, segment, frame, place, above)
    size = segment.shape[1]
    video = frame_segments(segment, frame)
    length = torch.arange(size + 1, device=segment.device)  # of a window, as a column
    frames = (video >= 0).sum(1)  # [B]

    def end(number: torch.Tensor, saved: torch.Tensor, window: torch.Tensor) -> State:
        """What is saved up to a frame, row `number + 1` of `saved`, and the window that ends there (1: none)."""
        here = torch.where((frame == number) & (segment >= 0), since, -1)
        # Places that have stood still through w - 1 steps: those of that many steps or more.
        exactly = histogram(here, size + 1)
        enough = exactly.sum(1, keepdim=True) - exactly.cumsum(1) + exactly
        through = torch.nn.functional.pad(enough, (1, 0))[:, : size + 1]
        possible = (length >= 2) & (length <= number + 1) & (length <= longest)
        before = saved.gather(1, (number + 1 - length).clamp(min=0).expand(saved.shape))
        gain = torch.where(possible, before + (length - 1) * through, -1)
        most = gain.amax(1, keepdim=True)
        alone = saved.gather(1, number.expand(saved.shape[0], 1))
        at = (number + 1).expand(saved.shape[0], 1)
        better = most > alone
        shortest = (gain == most).float().argmax(1, keepdim=True)
        return saved.scatter(1, at, torch.maximum(most, alone)), window.scatter(1, at, torch.where(better, shortest, 1))

    zeros = torch.zeros(segment.shape[0], size + 1, dtype=torch.int64, device=segment.device)
    rounds = torch.nn.functional.pad(frames, (1, 0)).amax(0)
    _, window = repeat(end, (zeros, zeros.clone()), rounds)

    def back(number: torch.Tensor, begins: torch.Tensor, at: torch.Tensor) -> State:
        """From the last frame on: where the window that ends in front of row `at [B, 1]` begins."""
        begin = at - window.gather(1, at)
        there = at > 0
        return begins.scatter(1, torch.where(there, begin + 1, 0), 1), torch.where(there, begin, at)

    begins = repeat(back, (zeros.clone(), frames[:, None].clone()), rounds)[0]
    return numbered((begins[:, 1:] > 0) & (video >= 0), frame)
