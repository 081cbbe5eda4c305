"""What the decoder is given, and what it makes of that in front of its first block.

Most decoders hand it on as it is. Some add positions to it or scale it, which features behind the projector have not
seen yet: merged ones pass through the decoder's own beginning once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tvc.trace.observe import named_arguments


class _Reached(Exception):
    """Carries what enters the first block out of the decoder."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


class Entry:
    """The beginning of one decoder, on its way through a call."""

    def __init__(self, decoder: torch.nn.Module):
        self._decoder = decoder
        self._arguments: dict[str, Any] = {}
        self._asked = False
        self._as_it_is = True

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block a call of the decoder is noted."""

        def called(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._arguments = named_arguments(decoder, args, kwargs)

        handle = self._decoder.register_forward_pre_hook(called, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def reached(self, hidden: torch.Tensor) -> None:
        """The first block is about to run on `hidden`; leads back to `hidden_of` where that asked for it."""
        if self._asked:
            raise _Reached(hidden)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, D] what the decoder was given, where `hidden` enters its first block."""
        given = self._arguments.get("inputs_embeds")
        self._as_it_is = given is None or given is hidden
        return hidden if given is None else given

    def hidden_of(self, features: torch.Tensor) -> torch.Tensor:
        """[B, S, D] what enters the first block where the decoder is given `features` in the place of its own."""
        if self._as_it_is:
            return features
        self._asked = True
        try:
            self._decoder.forward(**{**self._arguments, "inputs_embeds": features})
        except _Reached as reached:
            return reached.hidden
        finally:
            self._asked = False
        return features  # no block at all
