"""Positions by hand: what the decoder's rotary embedding makes of others than the model's own."""

from __future__ import annotations

import math
from typing import Any

import torch

from tvc.errors import TraceError
from tvc.policy.positions import WHOLE


def in_fractions(mask: torch.Tensor, image: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    """[S] float32 position of every token, one after the other, where a visual one takes `stride` / 256; pads 0.

    Args:
        mask: [S] bool, False at padding.
        image: [S] int64 number of the image that a token is of, -1 for text.
        first: position of a first token of text.
    """
    made = torch.zeros(len(mask), dtype=torch.float32)
    last, front, count, within = float(first - 1), 0, 0, -1
    for column in mask.nonzero().flatten().tolist():
        number = int(image[column])
        if number < 0:
            last = math.ceil(last) + 1
        else:
            if number != within:
                front, count = math.ceil(last), 0
            count += 1
            last = front + count * stride / WHOLE
        within, made[column] = number, last
    return made.to(mask.device)


class Rotary:
    """The calls of a decoder's rotary embeddings, made again for other positions."""

    def __init__(self, decoder: torch.nn.Module):
        self.modules = [part for name, part in decoder.named_children() if "rotary" in name]
        self._name = type(decoder).__name__
        self._calls: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []  # what came out, and the call
        self._again = False

    def seen(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of `modules`."""
        if not self._again:
            self._calls.append((output, module, args, kwargs))

    def at(self, positions: torch.Tensor, given: Any) -> Any:
        """Position embeddings for `positions`, of the kind of the embeddings `given` to a block."""
        if not self._calls:
            raise TraceError(
                "the decoder has no rotary module whose positions could be numbered afresh",
                where="verification",
                got=self._name,
                want="a decoder with rotary_emb",
                fix="write positions: keep, or compile with verify=False",
                slug="no-rotary",
            )
        alike = [call for output, *call in self._calls if output is given] or [list(self._calls[-1][1:])]
        module, args, kwargs = alike[-1]
        if "position_ids" in kwargs:
            kwargs = {**kwargs, "position_ids": positions}
        else:
            args = (args[0], positions, *args[2:])
        self._again = True
        made = module(*args, **kwargs)
        self._again = False
        return made
