"""log_det_keep on Triton: all cosines at once, then every round of the Cholesky factor in one program a segment."""

from __future__ import annotations

import torch

from tvc.kernels.greedy import directions
from tvc.kernels.providers import Support
from tvc.kernels.providers._greedy import gram, nothing, room, taken


def supports(
    feature: torch.Tensor,
    relevance: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> Support:
    return room(segment)


def launch(
    feature: torch.Tensor,
    relevance: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that span the largest volume."""
    if segment.shape[1] == 0 or counts.shape[1] == 0:
        return nothing(segment, slots)
    cosines = gram(directions(feature))
    weight = torch.nan_to_num(relevance.float(), 0.0) + 1e-6
    own = weight * weight * cosines.diagonal(dim1=1, dim2=2)
    return taken("log_det", cosines, own, weight, segment, counts, permille, count, slots, unit=0.0)
