"""max_sum_keep on Triton: all cosines at once, then every round in one program a segment."""

from __future__ import annotations

import torch

from tvc.kernels.greedy import directions
from tvc.kernels.providers import Support
from tvc.kernels.providers._greedy import gram, nothing, room, taken


def supports(
    feature: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> Support:
    return room(segment)


def launch(
    feature: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that are unlike those taken before."""
    if segment.shape[1] == 0 or counts.shape[1] == 0:
        return nothing(segment, slots)
    start = torch.nan_to_num(score.float(), torch.finfo(torch.float32).min)
    cosines = gram(directions(feature))
    return taken("max_sum", cosines, start, start, segment, counts, permille, count, slots, unit=1.0)
