"""whole_chunks, pool_entries, pool_cache: what caches hold of a prompt's frames once it has been read.

whole_chunks   which visual tokens stay as they are: those of the first, the last and the best chunks of frames
               frame [B, V] int64 (see frames.py), score [B, V] float or None -> [B, V] bool, pads False
               A chunk's score is the mean of its tokens', the best are the highest, the earlier one first among equals;
               NaN is the lowest.
pool_entries   the entries that a chunk of slots becomes: every text token, every token that stays, and one entry for
               each run of `tokens` of the other ones of a frame, the last run of a frame being shorter
               query_positions [B, S] int64 (-1 pads), visual_index and frame [B, V] int64 (-1 pads), whole [B, V] bool
               -> entry [B, S] int64 the entry of each slot, counted from 0 in each sample, -1 pads; kept [B, M] int64
                  the first slot of each entry, ascending, pads (-1) first; M = the most entries of a sample of the
                  batch (an unbacked size)
pool_cache     a layer's keys or values with one row for each entry, the mean of its slots'
               held [B, G, N, d], whose last S rows are the slots', entry and kept as above -> [B, G, N - S + M, d]
               Sums are float32; an entry of one slot is that slot's row bit for bit; pads 0.

Reference: Video-XL-2, arXiv:2506.19225 (bi-level key-value decoding), whose pooling leaves out what fills no run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.frames import first_of, lengths, table
from tvc.kernels.op import op
from tvc.kernels.segments import pack
from tvc.kernels.select_threshold import largest


def _frames() -> torch.Tensor:
    """Two samples: frames of 3, 4, 1 and 5 tokens, and pads in front of frames of 2 and 7."""
    rows = [[0] * 3 + [1] * 4 + [2] + [3] * 5, [-1] * 4 + [0] * 2 + [1] * 7]
    return torch.tensor(rows)


def _chunk_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    frame, score = _frames(), torch.randn(2, 13)
    yield "ends", (frame, None, 1, 1, 1, 0)
    for size in (1, 2, 5):
        yield f"best-of-chunks-of-{size}", (frame, score, size, 0, 0, 2)
        yield f"all-rules-chunks-of-{size}", (frame, score, size, 1, 1, 1)
    yield "none", (frame, None, 2, 0, 0, 0)
    yield "more-than-there-are", (frame, score, 2, 0, 0, 9)
    yield "ties", (frame, torch.ones(2, 13), 1, 0, 0, 2)
    yield "nan", (frame, score.masked_fill(score > 0.5, float("nan")), 1, 0, 0, 2)
    yield "endless", (frame, score.masked_fill(frame == 1, float("-inf")), 1, 0, 0, 4)
    yield "no-visual-token", (frame[:, :0], score[:, :0], 2, 1, 1, 1)


@op(_chunk_cases)
def whole_chunks(
    frame: torch.Tensor, score: torch.Tensor | None, size: int, first: int, last: int, best: int
) -> torch.Tensor:
    """[B, V] bool: the tokens of the chunks of `size` frames that stay as they are."""
    chunk = torch.where(frame < 0, -1, frame // size)
    # One more column keeps the maximum defined for V = 0.
    end = torch.nn.functional.pad(chunk, (1, 0), value=-1).amax(1, keepdim=True)
    stays = (chunk < first) | (chunk > end - last)
    if score is not None:
        number = lengths(chunk)
        mean = table(score[:, :, None], chunk).squeeze(2) / number.clamp(min=1)
        lowest = torch.finfo(mean.dtype).min  # chunks that are not there come behind those of NaN
        mean = torch.where(torch.isnan(mean), lowest, mean.clamp(min=lowest))
        there = (number > 0) & (torch.arange(number.shape[1], device=frame.device) > 0)  # row 0 takes the pads
        order = torch.sort(torch.where(there, mean, float("-inf")), dim=1, descending=True, stable=True).indices
        place = torch.arange(order.shape[1], device=frame.device).expand(order.shape)
        rank = torch.zeros_like(order).scatter(1, order, place)
        stays = stays | (rank.gather(1, chunk + 1) < best)
    return stays & (chunk >= 0)


def _entry_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    slots = torch.arange(17).repeat(2, 1)
    slots[1, :3] = -1
    visual = torch.tensor(
        [[1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14], [-1, -1, -1, -1, 3, 4, 6, 7, 8, 9, 10, 12, 13]]
    )
    frame, whole = _frames(), torch.zeros(2, 13, dtype=torch.bool)
    for tokens in (1, 2, 4, 9):
        yield f"runs-of-{tokens}", (slots, visual, frame, whole, tokens)
    yield "some-stay", (slots, visual, frame, frame == 1, 3)
    yield "all-stay", (slots, visual, frame, frame >= 0, 3)
    step = torch.tensor([[21], [-1]])
    yield "no-visual-token", (step, visual[:, :0], frame[:, :0], whole[:, :0], 4)


@op(_entry_cases)
def pool_entries(
    query_positions: torch.Tensor,
    visual_index: torch.Tensor,
    frame: torch.Tensor,
    whole: torch.Tensor,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S] the entry of each slot, [B, M] the slot that stands for each entry)."""
    number = torch.arange(frame.shape[1], device=frame.device).expand(frame.shape)
    inside = number - first_of(frame).gather(1, frame + 1)  # a frame's tokens stand side by side
    leader = torch.where(whole | (frame < 0), number, number - inside % tokens)
    leader = visual_index.gather(1, leader)
    # Column 0 takes the pads.
    slot = torch.arange(query_positions.shape[1] + 1, device=frame.device).expand(frame.shape[0], -1) - 1
    leader = slot.scatter(1, visual_index + 1, leader)[:, 1:]
    stands = (query_positions >= 0) & (leader == slot[:, 1:])
    kept = pack(stands, largest(stands))
    place = stands.long().cumsum(1) - 1
    return torch.where(query_positions < 0, -1, place.gather(1, leader.clamp(min=0))), kept


def _cache_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    entry = torch.tensor([[0, 1, 1, 2, 2, 3], [-1, 0, 0, 0, 1, 1]])
    kept = torch.tensor([[0, 1, 3, 5], [-1, -1, 1, 4]])
    for past in (0, 3):
        held = torch.randn(2, 3, past + 6, 5)
        yield f"pooled-past{past}", (held, entry, kept)
        yield f"nothing-pooled-past{past}", (held, torch.arange(6).repeat(2, 1), torch.arange(6).repeat(2, 1))
    one = torch.zeros(2, 1, dtype=torch.int64)
    yield "long-run", (torch.ones(2, 1, 300, 2), one.expand(2, 300).contiguous(), one)  # more ones than bfloat16 counts
    yield "step", (torch.randn(2, 1, 4, 2), one, one)


@op(_cache_cases)
def pool_cache(held: torch.Tensor, entry: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[B, G, N - S + M, d]: what stood in front of the chunk, then the means of the entries."""
    past = held.shape[2] - entry.shape[1]
    own = held[:, :, past:].float()
    # Row 0 takes the pads and is cut off; those of `kept` stand in front.
    row = torch.where(entry < 0, 0, entry + 1 + (kept < 0).sum(1, keepdim=True))
    index = row[:, None, :, None].expand(own.shape)
    room = own.new_zeros(own.shape[0], own.shape[1], kept.shape[1] + 1, own.shape[3])
    ones = torch.ones_like(entry, dtype=torch.float32)
    number = ones.new_zeros(entry.shape[0], kept.shape[1] + 1).scatter_add(1, row, ones)
    mean = room.scatter_add(2, index, own) / number.clamp(min=1)[:, None, :, None]
    return torch.cat([held[:, :, :past], mean[:, :, 1:].to(held.dtype)], 2)
