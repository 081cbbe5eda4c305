"""What the compiled model's caches hold, said of the untouched model: masks and running numbers of a whole sequence.

A sequence is a prompt and what was generated behind it, `prompt` columns and then one more a step. What layers evict is
there as long as the prompt is read, and gone for every token that is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def evicted(steps: Sequence[Any], held: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Per decoder layer [B, S] bool: the columns that leave its cache once the prompt has been read.

    Args:
        steps: of a resolved policy.
        held: per layer [B, S] bool, the columns that ran through it.
    """
    lost = [torch.zeros_like(columns) for columns in held]
    for step in steps:
        if step.evict:
            site = int(step.at.removeprefix("language."))
            for layer in range(int(step.evict.removeprefix("language.")), site):
                lost[layer] |= held[site - 1] & ~held[site]
    return lost


def narrowed(own: torch.Tensor | None, alive: torch.Tensor, lost: torch.Tensor, prompt: int) -> torch.Tensor:
    """[B, 1, Q, S] bool: the model's own mask (None: causal) without the keys that were dropped.

    Args:
        own: [B|1, 1, Q, S], bool or added to logits, of the last Q columns.
        alive: [B, S] bool, columns that run through the layer.
        lost: [B, S] bool, those of them that leave its cache.
        prompt: columns of the prompt.
    """
    if own is None:
        size = alive.shape[1]
        own = torch.ones(size, size, dtype=torch.bool, device=alive.device).tril()[None, None]
    if own.dtype != torch.bool:
        own = own >= 0
    # Tokens that were generated came one by one: no token has seen them before they were there.
    places = torch.arange(own.shape[3], device=own.device)
    rows = places[-own.shape[2] :, None]
    there = (places < prompt) | (places <= rows)
    gone = (rows >= prompt) & lost[:, None, None, :]
    return own & there & alive[:, None, None, :] & ~gone


def out_of_reach(frame: torch.Tensor, size: int, previous: int) -> torch.Tensor:
    """[B, S, S] bool: the tokens of frames that a token of a frame does not see: more than `previous` chunks of `size`
    frames before its own.

    Args:
        frame: [B, S] int64 frame of every column, -1 where it shows none.
    """
    row, column = frame[:, :, None], frame[:, None, :]
    first = (row // size - previous) * size  # the first frame that the row's token sees
    return (row >= 0) & (column >= 0) & (column < first)


def in_window(mask: torch.Tensor, window: int, prompt: int) -> torch.Tensor:
    """The mask of a layer, whose window holds for tokens that were generated whatever spans there are before it."""
    places = torch.arange(mask.shape[3], device=mask.device)
    rows = places[-mask.shape[2] :, None]
    return mask & ((rows < prompt) | (places > rows - window))


def running(alive: torch.Tensor, lost: torch.Tensor, prompt: int) -> torch.Tensor:
    """[B, S] int64: the number of each column among the tokens that its layer held when it came."""
    at_first, later = alive.long().cumsum(1), (alive & ~lost).long().cumsum(1)
    generated = torch.arange(alive.shape[1], device=alive.device) >= prompt
    return (torch.where(generated, later, at_first) - 1).clamp(min=0)
