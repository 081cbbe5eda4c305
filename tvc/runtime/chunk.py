"""From what the family's own code hands to its decoder to the inputs of the decoder graph: packing a chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch


@dataclasses.dataclass
class Chunk:
    """A batch of new tokens, one row a sample, slots in the order of the processor's `input_ids`."""

    embeds: torch.Tensor  # [B, S, D]
    positions: torch.Tensor  # rotary positions, [B, S] or [A, B, S]; float32 where they are fractions
    valid: torch.Tensor  # [B, S] bool: not padding
    visual: torch.Tensor  # [B, S] bool: visual tokens
    segment: torch.Tensor  # [B, S] int64 image of the sample that the slot belongs to, -1 text
    images: int  # images of a sample at most
    seen: int  # sequence places before this chunk
    order: torch.Tensor | None = None  # [B, S] sequence place of each slot; set by `left_packed`
    extras: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # further inputs [B, S, ...] by name
    saved: torch.Tensor | None = None  # [B] int64 positions that fractions have saved, this chunk's counted in
    full: bool = False  # no slot is padding; set by `left_packed`
    crossed: Any = None  # `Crossed`: visual tokens that are in no slot


def ragged(mask: torch.Tensor) -> torch.Tensor:
    """[B, W] slots where each row of `mask` is True, ascending, then -1 pads; W is the longest row."""
    counts = mask.sum(1)
    width = int(counts.max()) if mask.shape[0] else 0
    slots = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, :width]
    return torch.where(torch.arange(width, device=mask.device) < counts[:, None], slots, -1)


def take(values: torch.Tensor, index: torch.Tensor, pad: int = -1) -> torch.Tensor:
    """values [B, S] at index [B, W]; pads of the index give `pad`."""
    return torch.where(index < 0, pad, values.gather(1, index.clamp(min=0)))


def rows_at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [B, S, D] at index [B, W] -> [B, W, D]; pads of the index give the first row."""
    return values.gather(1, index.clamp(min=0).unsqueeze(2).expand(-1, -1, values.shape[2]))


def put_back(values: torch.Tensor, index: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [B, S, D] with `features` [B, W, D] at index [B, W], pads left out; and [B, S] bool where they went."""
    index = torch.where(index < 0, values.shape[1], index)  # pads write to a row that is cut off
    room = torch.cat([values, values[:, :1]], 1)
    room = room.scatter(1, index.unsqueeze(2).expand(-1, -1, room.shape[2]), features.to(room.dtype))
    there = torch.zeros(index.shape[0], room.shape[1], dtype=torch.bool, device=index.device)
    return room[:, :-1], there.scatter(1, index, True)[:, :-1]


def left_packed(chunk: Chunk) -> Chunk:
    """The chunk without columns that are padding everywhere, each row's padding moved to its front."""
    batch, slots = chunk.valid.shape
    places = torch.arange(slots, device=chunk.valid.device).expand(batch, -1) + chunk.seen
    if bool(chunk.valid.all()):
        return dataclasses.replace(chunk, order=places, full=True)
    width = int(chunk.valid.sum(1).max())
    index = torch.argsort(chunk.valid.to(torch.int8), dim=1, stable=True)[:, slots - width :]
    valid = chunk.valid.gather(1, index)
    return Chunk(
        embeds=rows_at(chunk.embeds, index),
        positions=chunk.positions.gather(-1, index.expand(*chunk.positions.shape[:-2], -1, -1)),
        valid=valid,
        visual=chunk.visual.gather(1, index) & valid,
        segment=chunk.segment.gather(1, index),
        images=chunk.images,
        seen=chunk.seen,
        order=torch.where(valid, places.gather(1, index), -1),
        extras={name: _gathered(value, index) for name, value in chunk.extras.items()},
        crossed=chunk.crossed,
        saved=chunk.saved,
    )


def _gathered(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [B, S, ...] at index [B, W] -> [B, W, ...]."""
    trailing = values.shape[2:]
    return values.gather(1, index.reshape(*index.shape, *[1] * len(trailing)).expand(*index.shape, *trailing))


def chunk_inputs(chunk: Chunk) -> dict[str, torch.Tensor]:
    """The decoder graph's chunk inputs of a left-packed chunk."""
    if chunk.images:
        visual_index = ragged(chunk.visual)
        segment = take(chunk.segment, visual_index)
        images = torch.arange(chunk.images, device=segment.device)
        counts = (segment.unsqueeze(2) == images).sum(1)
    else:  # as in a decode step, where every look at the device is felt
        visual_index = segment = counts = chunk.segment.new_empty(len(chunk.segment), 0)
    if chunk.full and not chunk.images:
        text_index = torch.arange(chunk.valid.shape[1], device=chunk.valid.device).repeat(len(chunk.valid), 1)
    else:
        text_index = ragged(chunk.valid & ~chunk.visual)
    return {
        "inputs_embeds": chunk.embeds,
        "position_ids": chunk.positions,
        "query_positions": chunk.order if chunk.order is not None else chunk.positions,
        "text_index": text_index,
        "visual_index": visual_index,
        "visual_segment": segment,
        "visual_counts": counts,
        **chunk.extras,
    }
