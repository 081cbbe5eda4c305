"""bipartite_merge on Triton: partners by tiles of cosines, who merges by radix selection, one launch that merges."""

from __future__ import annotations

import torch

from tvc.kernels.merge_bipartite import halves
from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._assign import nearest
from tvc.kernels.providers._merge import merged
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._select import best
from tvc.kernels.segments import mark, per_token

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MOST = 4096  # on an H200 the tiles take as long as the reference at 2,304 tokens, and twice as long at 16,384


def supports(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    remove: int,
    slots: int,
    reduce: str,
    whole: bool,
) -> Support:
    if any(value.dtype not in FLOATS for value in (feature, metric, size)):
        return no(f"feature, metric and size are {feature.dtype}, {metric.dtype} and {size.dtype}")
    if feature.shape[1] > MOST:
        return no(
            f"there are {feature.shape[1]} visual tokens; above {MOST} the reference's matrix products are faster"
        )
    return YES


def launch(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    remove: int,
    slots: int,
    reduce: str,
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the tokens that stay."""
    batch, visual = segment.shape
    if visual == 0 or counts.shape[1] == 0:
        index = torch.full((batch, slots), -1, dtype=torch.int64, device=segment.device)
        return index, feature.new_zeros(batch, slots, feature.shape[2]), size.new_zeros(batch, slots)
    even, odd, _ = halves(segment, counts, whole)
    partner, cosine = nearest(metric, segment, even, odd)
    owner = torch.where(even >= 0, per_token(segment, even), -1)
    if whole:
        gone = torch.full_like(counts, visual - slots)
    else:
        gone = counts - (counts * permille + 500) // 1000 if permille > 0 else (counts // 2).clamp(max=remove)
    member = best(cosine, owner, gone) > 0
    stays = (segment >= 0) & ~mark(torch.where(member, even, -1), visual)
    index = packed(stays.to(torch.int8), slots)
    place = stays.cumsum(1) + (slots - 1 - stays.sum(1, keepdim=True))
    # Column 0 takes the even tokens that go nowhere and is cut off.
    into = torch.where(member, per_token(place, per_token(odd, partner)), -1)
    to = torch.full((batch, visual + 1), -1, dtype=torch.int64, device=segment.device)
    to = to.scatter(1, torch.where(member, even + 1, 0), into)[:, 1:]
    return index, *merged(feature, size, index, to, "mean" if reduce == "mean" else "weighted")
