"""max_min_keep on Triton: all cosines at once, then every round in one program a segment."""

from __future__ import annotations

import torch

from tvc.kernels.greedy import directions
from tvc.kernels.providers import Support
from tvc.kernels.providers._greedy import alone, gram, nothing, room, taken


def supports(
    feature: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int
) -> Support:
    return room(segment)


def launch(
    feature: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, permille: int, count: int, slots: int
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that lie far apart."""
    if segment.shape[1] == 0 or counts.shape[1] == 0:
        return nothing(segment, slots)
    cosines = gram(directions(feature))
    start = alone(cosines, segment)
    return taken("max_min", cosines, start, start, segment, counts, permille, count, slots, unit=1.0)
