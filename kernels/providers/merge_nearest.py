"""merge_nearest on Triton: nearest targets by tiles of cosines, and one launch that merges and gathers."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._assign import nearest
from tvc.kernels.providers._merge import Reduce, merged
from tvc.kernels.providers._pack import packed
from tvc.kernels.rest_merge import pick_targets
from tvc.kernels.segments import budgets, mark, per_token

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
REDUCES: dict[str, Reduce] = {"mean": "mean", "target_mean": "target_mean", "size_weighted": "weighted"}


def supports(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    targets: str,
    amount: int,
    slots: int,
    reduce: str,
    permille: int = 0,
    within: float = 2.0,
) -> Support:
    if any(value.dtype not in FLOATS for value in (feature, metric, size)):
        return no(f"feature, metric and size are {feature.dtype}, {metric.dtype} and {size.dtype}")
    if reduce not in REDUCES:
        return no(f"reduce is {reduce}")
    return YES


def launch(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    targets: str,
    amount: int,
    slots: int,
    reduce: str,
    permille: int = 0,
    within: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens and the targets, the other tokens merged into the targets."""
    batch, visual = segment.shape
    width, total = (chosen.shape[1],) * 2 if targets == "kept" else (slots, chosen.shape[1] + slots)
    if visual == 0:
        index = torch.full((batch, total), -1, dtype=torch.int64, device=segment.device)
        return index, feature.new_zeros(batch, total, feature.shape[2]), size.new_zeros(batch, total)
    kept = mark(chosen, visual)
    rest = (segment >= 0) & ~kept
    if targets == "kept":
        target = stays = kept
    else:
        target = pick_targets(rest, segment, counts, score, targets, budgets(counts, permille, amount))
        stays = kept | target
    member = rest & ~target
    column = torch.arange(visual, device=segment.device)
    index = packed(target.to(torch.int8), width)
    number, cosine = nearest(metric, segment, torch.where(member, column, -1), index)
    if within < 2.0:
        member = member & (cosine >= 1.0 - within)
    result = packed(stays.to(torch.int8), total)
    place = stays.cumsum(1) + (total - 1 - stays.sum(1, keepdim=True))
    to = torch.where(member & (number < width), per_token(place, per_token(index, number)), -1)
    return result, *merged(feature, size, result, to, REDUCES[reduce])
