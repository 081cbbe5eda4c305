"""Plain functions that several ops share: places inside a segment, budgets per segment, masks turned into indices.

A segment is one scope of a budget, usually an image. `segment [B, V]` holds its number for each visual token (-1 pads)
and `counts [B, N]` how many tokens each has, so that `counts` is always the histogram of `segment`.

All of them hold for V = 0 and N = 0. No reduction runs along a filled axis of an empty tensor, because ONNX Runtime
returns the unreduced shape there.
"""

from __future__ import annotations

import torch

from tvc.kernels.portions import Portion


def ranks(segment: torch.Tensor, counts: torch.Tensor, score: torch.Tensor | None = None) -> torch.Tensor:
    """[B, V] int64: the place of each token inside its segment, 0 first; what pads get means nothing.

    Args:
        segment: [B, V] int64, -1 pads.
        counts: [B, N] int64, tokens of each segment.
        score: [B, V] float orders by descending score, the lower index first among equals and NaN last; None keeps the
            order along V.
    """
    if score is None:
        order = torch.sort(segment, dim=1, stable=True).indices
    else:
        score = torch.where(torch.isnan(score), float("-inf"), score)
        by_score = torch.sort(score, dim=1, descending=True, stable=True).indices
        # Two stable sorts instead of one with a combined key: no key holds a float and an integer exactly.
        order = by_score.gather(1, torch.sort(segment.gather(1, by_score), dim=1, stable=True).indices)
    pads = (segment < 0).sum(1, keepdim=True)
    starts = torch.cat([pads, pads + counts.cumsum(1)], dim=1)
    place = torch.arange(segment.shape[1], device=segment.device)
    place = place - starts.gather(1, segment.gather(1, order).clamp(min=0))
    return torch.zeros_like(segment).scatter(1, order, place)


def budgets(counts: torch.Tensor, permille: int, count: int) -> torch.Tensor:
    """[B, N] int64: how many tokens of each segment stay; `count` where it is positive, else a share: `portions.py`."""
    return counts.clamp(max=count) if count > 0 else Portion.read(permille, count).of(counts)


def per_token(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[B, V]: the entry of `values [B, N]` at each token's segment; what pads get means nothing."""
    # One more column, so that pads have something to read where N = 0.
    return torch.cat([values, values.new_zeros(values.shape[0], 1)], dim=1).gather(1, segment.clamp(min=0))


def rows_at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, K, D]: the rows of `values [B, C, D]` at `index [B, K]`; zeros for pads (-1), also where C = 0."""
    values = torch.nn.functional.pad(values, (0, 0, 1, 0))
    return values.gather(1, (index + 1)[:, :, None].expand(-1, -1, values.shape[2]))


def or_pad(values: torch.Tensor, index: torch.Tensor, pad: float) -> torch.Tensor:
    """[B, K]: `values [B, V]` at `index [B, K]`; `pad` for pads (-1), also where V = 0 and K is not."""
    padded = torch.nn.functional.pad(values, (0, 1), value=pad)
    return padded.gather(1, torch.where(index < 0, values.shape[1], index))


def follow(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, K] int64: `values [B, V]` at `index [B, K]`; pads stay -1."""
    return or_pad(values, index, -1)


def take_rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, K, D]: the rows of `values [B, V, D]` at `index [B, K]`; pads give row 0, which is there."""
    return values.gather(1, index.clamp(min=0).unsqueeze(2).expand(-1, -1, values.shape[2]))


def count_segments(segment: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, N] int64: how many tokens stand in each segment; `counts [B, N]` tells N."""
    number = torch.arange(counts.shape[1], device=segment.device)
    return (segment.unsqueeze(2) == number).sum(1)


def pack(keep: torch.Tensor, slots: int) -> torch.Tensor:
    """[B, slots] int64: where `keep [B, V]` is true, ascending, pads (-1) first; no sample may keep more than fit."""
    total = keep.sum(1, keepdim=True)
    # Column 0 takes what does not stay and is cut off.
    place = torch.where(keep, keep.cumsum(1) + (slots - total), 0)
    column = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape[0], -1)
    packed = torch.full((keep.shape[0], slots + 1), -1, dtype=torch.int64, device=keep.device).scatter(1, place, column)
    return packed[:, 1:].clone(memory_format=torch.contiguous_format)


def mark(index: torch.Tensor, width: int) -> torch.Tensor:
    """[B, width] bool: True at the positions listed in `index [B, K]` (-1 pads): the inverse of `pack`."""
    flags = torch.zeros(index.shape[0], width + 1, dtype=torch.int64, device=index.device)
    return flags.scatter(1, index + 1, torch.ones_like(index))[:, 1:] > 0


def starts(segment: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, V] int64: where the segment of each token starts once pads stand in front and segment after segment follows.

    That start and a place inside the segment make a token's spot, in 0..V-1. What pads get means nothing.
    """
    pads = (segment < 0).sum(1, keepdim=True)
    return torch.cat([pads, pads + counts.cumsum(1)], dim=1).gather(1, segment.clamp(min=0))
