"""Where a model's tokens attend to later ones: its own masks, read as spans that see themselves in both directions.

Masks are rebuilt from positions behind every cut, so that a mask must be of a form that positions can say: causal, with
a window in some layers, and with spans of neighbouring tokens (a prefix, the tokens of an image) that see each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch

import tvc.kernels.attention_mask  # noqa: F401  registers torch.ops.tvc.attention_mask
from tvc.errors import ModelError


def read_spans(given: Any, valid: torch.Tensor, seen: int, windows: Collection[int]) -> torch.Tensor | None:
    """[B, S, 2] int64 first and last place of the span of each slot, or None where attention is causal.

    Args:
        given: what the model hands to its decoder as attention mask: a tensor [B|1, 1, S, N] or several by name.
        valid: [B, S] bool: slots of the chunk that are no padding.
        seen: places of the sequence before the chunk.
        windows: the windows of the decoder's layers, 0 where one has none.

    Raises:
        ModelError: a mask is not causal, and no spans explain it.
    """
    given_masks = _masks(given, windows)
    squares = [_square(mask, valid) for mask, _ in given_masks]
    columns = torch.arange(valid.shape[1], device=valid.device)
    ahead = columns[None, :] > columns[:, None]
    if not any(bool((square & ahead).any()) for square in squares):
        return None
    own = columns.expand(valid.shape)
    reach = torch.stack([torch.where(square & ahead, columns, own.unsqueeze(2)).amax(2) for square in squares]).amax(0)
    spans = torch.stack([own, reach], 2)
    for square, (_, own_windows) in zip(squares, given_masks, strict=True):
        found = _explained(square, valid, spans, own_windows)
        if found is None:
            raise ModelError(
                "the attention of the decoder has a form that a cut cannot carry on",
                where="attention mask of the decoder",
                got="a mask that is neither causal nor causal with spans that see themselves",
                want="causal attention, sliding windows, and spans of neighbouring tokens that see each other",
                fix="a model of another attention pattern cannot be compiled",
                slug="not-causal",
            )
        spans = found
    return spans + seen


def _explained(
    square: torch.Tensor, valid: torch.Tensor, spans: torch.Tensor, windows: Iterable[int]
) -> torch.Tensor | None:
    """The spans that give `square` in layers of one of `windows`, the first that does; None where there are none."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    places = torch.where(valid, columns, -1)
    for window in windows:
        outside = square & (columns <= columns[:, None] - window)
        first = torch.where(outside, columns, valid.shape[1]).amin(2)
        started = torch.where(first < valid.shape[1], first, columns) if window else spans[..., 0]
        tried = torch.stack([torch.minimum(started, spans[..., 0]), spans[..., 1]], 2)
        mask = torch.ops.tvc.attention_mask(places, places, window, tried)[:, 0]
        if torch.equal(mask & valid.unsqueeze(2), square):
            return tried
    return None


def _masks(given: Any, windows: Collection[int]) -> list[tuple[torch.Tensor, list[int]]]:
    """Every mask, and the windows of the layers that may use it: a wide span can hide which one a mask was made for."""
    sliding = sorted((window for window in set(windows) if window), reverse=True)
    if not isinstance(given, dict):
        given = {"": given}
        alike = [*sliding, *([0] if 0 in windows or not sliding else [])]
    else:
        alike = [0]
    held = [(mask, sliding or [0] if "sliding" in name else alike) for name, mask in given.items()]
    return [(mask, own) for mask, own in held if isinstance(mask, torch.Tensor) and mask.dim() == 4]


def _square(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, S, S] bool: which tokens of the chunk a token of it may attend to, padding left out."""
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    inside = allowed[:, 0, :, -valid.shape[1] :].to(valid.device)
    return inside & valid.unsqueeze(1) & valid.unsqueeze(2)
