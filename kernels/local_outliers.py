"""Plain functions: local outlier factors of numbers on a line, segment by segment.

Reference: local outlier factor (Breunig et al., 2000) with the conventions of scikit-learn: a number is not its own
neighbour, and 1e-10 is added to a mean reachability distance before it is inverted.
"""

from __future__ import annotations

import torch

from tvc.kernels.segments import per_token, ranks, starts


def local_outliers(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, neighbours: int, above: float
) -> torch.Tensor:
    """[B, V] bool: the tokens whose local outlier factor among those of their segment is larger than `above`.

    Takes O(B V neighbours) memory: on a sorted line neighbours stand side by side. A segment of one token has none; of
    neighbours at equal distances the larger numbers come first.

    Args:
        score: [B, V] float, one number a token; NaN counts as 0.
        segment, counts: as for every selector.
        neighbours: of each token; in a segment with fewer others all of them.
        above: the factor that has to be exceeded.
    """
    V, valid = segment.shape[1], segment >= 0
    score = torch.where(torch.isnan(score) | ~valid, 0.0, score.float())
    # All segments one after another, each in descending order; the last column takes the pads.
    begin = starts(segment, counts) - (~valid).sum(1, keepdim=True)
    spot = torch.where(valid, begin + ranks(segment, counts, score), V)

    line = score.new_zeros(score.shape[0], V + 1).scatter(1, spot, score)
    owner = torch.where(torch.arange(V + 1, device=segment.device) < counts.sum(1, keepdim=True), 0, -1)
    owner = owner.scatter(1, spot, torch.where(valid, segment, -1))
    step = torch.arange(1, neighbours + 1, device=segment.device)
    offset = torch.cat([-step.flip(0), step])
    place = torch.arange(V + 1, device=segment.device)[:, None] + offset  # [V + 1, 2 n]
    within = (place >= 0) & (place <= V)
    place = place.clamp(min=0).clamp(max=V).expand(segment.shape[0], -1, -1)

    def around(values: torch.Tensor) -> torch.Tensor:
        """[B, V + 1, 2 n]: the values at the neighbouring places."""
        return values[:, None, :].expand(-1, V + 1, -1).gather(2, place)

    other = within & (around(owner) == owner[:, :, None]) & (owner >= 0)[:, :, None]
    apart = torch.where(other, (around(line) - line[:, :, None]).abs(), float("inf"))
    order = torch.sort(apart, dim=2, stable=True).indices
    rank = torch.zeros_like(order).scatter(2, order, torch.arange(2 * neighbours, device=order.device).expand_as(order))
    near = other & (rank < neighbours)
    ones = torch.ones(2 * neighbours, 1, device=segment.device)
    number = (near.float() @ ones).squeeze(2).clamp(min=1)  # [B, V + 1]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (torch.where(near, values, 0.0) @ ones).squeeze(2) / number

    reach = torch.where(near, apart, 0.0).amax(2)  # the distance of the farthest neighbour
    density = 1.0 / (mean(torch.maximum(around(reach), torch.where(near, apart, 0.0))) + 1e-10)
    factor = mean(around(density)) / density
    return valid & (per_token(counts, segment) > 1) & (factor.gather(1, spot) > above)


def histogram(flag: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, N] int64: how many tokens of each segment are flagged."""
    # Column 0 takes the others.
    place = torch.where(flag, segment + 1, 0)
    numbers = counts.new_zeros(counts.shape[0], counts.shape[1] + 1)
    return numbers.scatter_add(1, place, torch.ones_like(place))[:, 1:]
