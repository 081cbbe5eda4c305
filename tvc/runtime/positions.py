"""Rotary positions: from the model's own to those of the graph, where visual tokens may take a fraction of one each."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from tvc.chunks import DecoderShape
from tvc.errors import InputError
from tvc.policy.positions import WHOLE


def in_strides(
    positions: torch.Tensor, visual: torch.Tensor, segment: torch.Tensor, stride: int, saved: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] float32 positions, and [B] int64 how many of them visual tokens have saved, this chunk's counted in.

    The i-th visual token of an image stands i * stride / 256 behind the token in front of the image, and the token
    behind the image one behind the last of these, rounded up. Positions below 2^16 are exact at any stride.

    Args:
        positions: [B, S] int64 whole positions, one a token, earlier chunks counted in.
        visual: [B, S] bool.
        segment: [B, S] int64 image of each visual token; where another image begins, or text, a new count does.
        saved: [B] int64 positions that visual tokens of earlier chunks have saved.
    """
    other = segment != pad(segment, (1, 0), value=-1)[:, :-1]
    starts = visual & (other | ~pad(visual, (1, 0))[:, :-1])
    ends = visual & pad(starts | ~visual, (0, 1), value=True)[:, 1:]
    number = visual.long().cumsum(1)
    rank = number - torch.where(starts, number - 1, 0).cummax(1).values  # of visual tokens in their image, from 1 on
    spared = torch.where(ends, rank - (rank * stride + WHOLE - 1) // WHOLE, 0)
    total = saved.unsqueeze(1) + spared.cumsum(1)
    text = positions - total
    front = text + spared - rank  # of a visual token: where the token in front of its image stands
    fractions = front.float() + rank.float() * (stride / WHOLE)
    return torch.where(visual, fractions, text.float()), saved + spared.sum(1)


def of_slots(given: torch.Tensor, shape: DecoderShape, ids: torch.Tensor) -> torch.Tensor:
    """The rotary positions of the slots of a chunk [B, S] `ids`: [B, S] or [axes, B, S], int64 or float32 as the model
    numbers tokens.

    Args:
        given: [B or 1, S'] or [axes, B or 1, S'] the model's own, of which the last S are the chunk's.

    Raises:
        InputError: tokens stand at fractions of a position, and the graph takes whole ones.
    """
    axes, fractions = shape.axes, given.is_floating_point() and not shape.real
    if fractions and bool((given != given.round()).any()):
        raise InputError(
            "tokens stand at fractions of a position, and the model was traced with whole ones",
            where="position_ids",
            got=str(given.dtype),
            want="positions as those of the sample inputs",
            fix="pass such inputs to tvc.compile(..., inputs=...)",
            slug="fractions",
        )
    given = given.to(torch.float32 if shape.real and not shape.stride else torch.int64)
    given = given[..., -ids.shape[1] :]  # some families number the cached tokens of a later turn as well
    if axes == 0:
        given = given[0] if given.dim() == 3 else given
        return given.expand(ids.shape[0], -1).contiguous()
    if given.dim() == 2:
        given = given.unsqueeze(0).expand(axes, -1, -1)
    return given[-axes:].expand(axes, ids.shape[0], -1).contiguous()
