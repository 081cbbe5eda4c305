"""Visual tokens that the text reads by cross-attention: what a chunk brings of them, and what is read of all so far.

They have no place in the sequence. Each has a number among all that its sample was given, by which the model's own mask
says which slot of the text reads it; a cache keeps the numbers of what it holds. Padding (tiles that an image lacks,
images that a sample lacks) is read by slots that read no image, as the untouched model has it: no cut takes it away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvc.chunks import CROSS_MASK, CROSS_ROWS, CROSS_STATES, Crossing, DecoderShape
from tvc.errors import InputError
from tvc.runtime.cache import StagedCache
from tvc.runtime.chunk import put_back, ragged, rows_at, take
from tvc.trace.crossing import seen_by


@dataclasses.dataclass
class Crossed:
    """The visual tokens that a chunk brings."""

    states: torch.Tensor  # [B, V, D]
    columns: torch.Tensor  # [B, V] int64 number of each among all that its sample was given, -1 pads
    segment: torch.Tensor  # [B, V] int64 image of the sample that each belongs to, -1 padding
    images: int  # images of a sample at most


def check_rows(inputs: Mapping[str, Any], crossing: Crossing, slots: tuple[int, int], past: StagedCache | None) -> None:
    """Refuses a mask of cross-attention without a row for each token of a chunk of `slots` (batch, length).

    The model's own code takes rows of the chunk alone, or of all so far.

    Raises:
        InputError: it has other rows.
    """
    mask = inputs.get(crossing.mask)
    whole = slots[1] + (past.seen if past is not None else 0)
    if isinstance(mask, torch.Tensor) and mask.dim() > 1 and mask.shape[1] != slots[1] and mask.shape[1] < whole:
        raise InputError(
            "the mask of cross-attention does not fit the text",
            where="forward",
            got=f"{crossing.mask} {list(mask.shape)} for {slots[1]} new tokens",
            want=f"{slots[1]} rows, or {whole} for all tokens so far",
            fix=f"repeat its last row for every token since: torch.cat([{crossing.mask}, {crossing.mask}[:, -1:]], 1)",
            slug="cross-mask",
        )


def brought(
    given: Mapping[str, Any], shape: DecoderShape, past: StagedCache | None, images: int, slots: tuple[int, int]
) -> tuple[Crossed | None, torch.Tensor]:
    """What a chunk of `slots` (batch, length) brings, and [B, S, N] bool which of all N so far each slot reads.

    Args:
        given: the decoder's arguments as the model's own code makes them.
        images: images of a sample at most.

    Raises:
        InputError: there is no mask, or it is not one of all visual tokens so far.
    """
    crossing: Any = shape.crossing
    states = given.get(crossing.states)
    before = past.offered if past is not None else 0
    new = states.numel() // (slots[0] * shape.width) if states is not None else 0
    seen = seen_by(given, crossing) if before + new else None
    if seen is None and before + new and (states is not None or slots[1] > 1):
        # Padding would be read as an image is, and by the model's own code causally or not as its attention has it.
        raise InputError(
            "nothing says which visual tokens each token of the text reads",
            where="forward",
            got=f"no {crossing.mask}, {slots[1]} new tokens and {before + new} visual ones",
            want=f"{crossing.mask} with a row for each new token",
            fix="pass the processor's, whose last row tokens behind the prompt repeat",
            slug="no-cross-mask",
        )
    if seen is None:
        seen = torch.ones(*slots, before + new, dtype=torch.bool, device=shape.device)
    if seen.shape != (*slots, before + new):
        raise InputError(
            "the mask of cross-attention does not fit the images and the text",
            where="forward",
            got=f"one of {list(seen.shape)} (batch, text, visual tokens)",
            want=f"{[*slots, before + new]}: all images so far, those of earlier calls first",
            fix="pass what the processor returned for the whole conversation",
            slug="cross-mask",
        )
    if states is None:
        return None, seen
    read = seen[:, :, before:].any(1)
    number = torch.arange(new, device=read.device).expand(slots[0], -1)
    segment = torch.where(read, number * images // new, -1)
    states = states.reshape(slots[0], new, shape.width).to(shape.dtype)
    return Crossed(states, number + before, segment, images), seen


def reduced(
    crossed: Crossed,
    run: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    kept: dict[str, torch.Tensor],
) -> Crossed:
    """What the cut at the projector leaves, padding included; `kept` learns which."""
    places = ragged(crossed.segment >= 0)
    segment = take(crossed.segment, places)
    images = torch.arange(crossed.images, device=segment.device)
    out = run(
        {
            "visual_features": rows_at(crossed.states, places),
            "visual_segment": segment,
            "visual_counts": (segment.unsqueeze(2) == images).sum(1),
        }
    )
    kept["projector"] = out["chosen"]
    states, present = put_back(crossed.states, take(places, out["chosen"]), out["reduced_features"])
    index = ragged(present | (crossed.segment < 0))
    return dataclasses.replace(
        crossed,
        states=rows_at(states, index),
        columns=take(crossed.columns, index),
        segment=take(crossed.segment, index),
    )


def decoder_inputs(
    crossed: Crossed | None, seen: torch.Tensor, past: StagedCache | None, shape: DecoderShape
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The decoder graph's inputs, and [B, C] the numbers of all that is cached behind the call.

    A slot none of whose visual tokens are left reads no image, as one that never had any. Where a sample has none at
    all, it reads a column of zeros, which adds nothing.
    """
    batch, device = seen.shape[0], seen.device
    columns = past.crossed if past is not None and past.crossed is not None else seen.new_zeros(batch, 0).long()
    if crossed is not None:
        states = crossed.states * (crossed.columns >= 0).unsqueeze(2)
        columns = given = torch.cat([columns, crossed.columns], 1)
    else:
        states = torch.zeros(batch, 1, shape.width, dtype=shape.dtype, device=device)
        given = torch.nn.functional.pad(columns, (0, 1), value=-1)
    there = given >= 0
    index = given.clamp(min=0).unsqueeze(1).expand(-1, seen.shape[1], -1)
    known = torch.nn.functional.pad(seen, (0, 1)) if not seen.shape[2] else seen
    reads = known.gather(2, index) & there.unsqueeze(1)
    any_read = reads.any(2, keepdim=True)
    mask = torch.where(any_read, reads, there.unsqueeze(1))
    mask[:, :, -1] |= ~there.any(1, keepdim=True)
    rows = any_read.squeeze(2).to(shape.dtype)
    return {CROSS_STATES: states, CROSS_MASK: mask, CROSS_ROWS: rows}, columns
