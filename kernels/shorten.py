"""shorten: the chunk behind a cut, everything that crosses it taken along at once.

Shapes:  chosen [B, K] int64 visual tokens that stay, ascending, -1 pads first; residual [B, S, D] float;
         merged [B, K, D] float, what stands for the chosen tokens, or None: they stay as they are;
         position_ids [B, S] or [A, B, S] int64 or float32; query_positions [B, S] int64, -1 pads; text_index [B, T] and
         visual_index [B, V] int64 slots of the chunk, -1 pads; segment, origin [B, V] int64; counts [B, N] int64
         -> the same eight of the shortened chunk, in the order residual, position_ids, query_positions, text_index,
            visual_index, segment, counts, origin, its S' = T + K slots those of the text and of the chosen tokens;
         -> kept [B, S'] int64 the slots that are left, ascending, pads (-1) first
Pads:    residual and position_ids of a pad slot are those of slot 0; everything else of a pad is -1.
Counts:  how many of the chosen tokens stand in each segment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op
from tvc.kernels.segments import count_segments, follow, take_rows

Shortened = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    slots = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [-1, -1, 2, 3, 4, 5, 6, 9]])
    text, visual = torch.tensor([[0, 1, 6, 7], [-1, 2, 6, 7]]), torch.tensor([[2, 3, 4, 5], [-1, 3, 4, 5]])
    segment, counts = torch.tensor([[0, 0, 1, 1], [-1, 0, 0, 0]]), torch.tensor([[2, 2], [3, 0]])
    origin = torch.tensor([[1, 3, 4, 7], [-1, 0, 2, 5]])
    residual, chunk = torch.randn(2, 8, 6), (slots, text, visual, segment, counts, origin)
    axes = torch.stack([slots * 2, slots + 1, slots * 3])
    some, none = torch.tensor([[0, 3], [-1, 2]]), torch.full((2, 2), -1)
    yield "dropped", (some, residual, None, slots, *chunk)
    yield "merged", (some, residual, torch.randn(2, 2, 6), slots, *chunk)
    yield "three-axes", (some, residual, torch.randn(2, 2, 6), axes, *chunk)
    yield "fractions", (some, residual, None, slots / 4, *chunk)
    yield "all-pads", (none, residual, None, slots, *chunk)
    yield "all-stay", (torch.tensor([[0, 1, 2, 3], [-1, 1, 2, 3]]), residual, None, slots, *chunk)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    last = torch.tensor([[9], [9]])
    yield "no-image", (empty, residual[:, :1], None, last, last, last * 0, empty, empty, empty, empty)
    yield "budget-without-image", (none, residual[:, :1], None, last, last, last * 0, empty, empty, empty, empty)


@op(_cases)
def shorten(
    chosen: torch.Tensor,
    residual: torch.Tensor,
    merged: torch.Tensor | None,
    position_ids: torch.Tensor,
    query_positions: torch.Tensor,
    text_index: torch.Tensor,
    visual_index: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    origin: torch.Tensor,
) -> Shortened:
    """The chunk that holds its text and the chosen visual tokens alone, and which slots these were."""
    slots = torch.cat([text_index, follow(visual_index, chosen)], dim=1)
    kept, source = torch.sort(slots, dim=1, stable=True)
    place = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape[0], -1)
    moved = torch.where(slots < 0, -1, torch.zeros_like(source).scatter(1, source, place))
    text = text_index.shape[1]
    rows, values = kept, residual
    if merged is not None:
        # One gather from the old residual and the merged values side by side: no write into either.
        rows = torch.where((source < text) | (kept < 0), kept, residual.shape[1] + source - text)
        values = torch.cat([residual, merged.to(residual.dtype)], 1)
    segment_after = follow(segment, chosen)
    return (
        take_rows(values, rows),
        _gather_last(position_ids, kept),
        follow(query_positions, kept),
        moved[:, :text].clone(),
        moved[:, text:].clone(),
        segment_after,
        count_segments(segment_after, counts),
        follow(origin, chosen),
        kept,
    )


def _gather_last(position_ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    index = kept.clamp(min=0)
    if position_ids.dim() == 3:
        index = index.unsqueeze(0).expand(position_ids.shape[0], -1, -1)
    return position_ids.gather(position_ids.dim() - 1, index)
