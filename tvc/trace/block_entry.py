"""With what the encoder's blocks are called, and whether they run on fewer tokens than the encoder has.

A cut inside the encoder shortens the hidden states alone. A block that takes, or makes, a value for every token (an
angle, a bias by place, a mask) has no meaning behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from tvc.program import Layout
from tvc.trace.attention import attention_as
from tvc.trace.layout import blocks, residual_argument
from tvc.trace.vision import REFUSALS


class BlockEntries:
    """The first call of each block of the encoder of `model`, on the meta device."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._calls: dict[int, dict[str, Any]] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Calls inside the block are noted."""

        def note(index: int) -> Any:
            def hook(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                call = {"args": args, **kwargs} if args else dict(kwargs)
                self._calls.setdefault(index, call)

            return hook

        layers = blocks(self.model)[1]
        handles = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def first(self) -> torch.Size | None:
        """The shape of the hidden states that enter the encoder's blocks; None: it has none."""
        return self._hidden(min(self._calls)).shape if self._calls else None

    def refuse(self, layout: Layout) -> Layout:
        """The layout, where no cut is legal in front of a block that runs on all tokens of the encoder alone."""
        open_sites = {site.name for site in layout.sites if site.legal and site.name.startswith("vision.")}
        bound = self._bound(layout.used_vision_blocks) if open_sites else 0
        reason = (
            f"vision.{bound - 1} takes or makes a value for every token of the encoder (an angle, a bias, a mask), "
            "which a cut does not shorten"
        )
        refused = open_sites & {f"vision.{k}" for k in range(bound)}
        sites = (dataclasses.replace(s, legal=False, reason=reason) if s.name in refused else s for s in layout.sites)
        return dataclasses.replace(layout, sites=tuple(sites))

    def _bound(self, used: int | None) -> int:
        """How many blocks of the first `used` (None: of all) end with one that runs on all tokens alone.

        Blocks take [n, T, C]; each is tried with fewer where it runs with T. With one less, tokens that have no angle
        may pass for a prefix that is one shorter; with half of them they cannot.
        """
        bound = 0
        with torch.no_grad(), attention_as(self.model, "sdpa"):
            for index in (index for index in self._calls if used is None or index < used):
                hidden = self._hidden(index)
                fewer = (hidden.shape[1] - 1, hidden.shape[1] // 2)
                if self._runs(index, hidden) and not all(self._runs(index, hidden[:, :count]) for count in fewer):
                    bound = max(bound, index + 1)
        return bound

    def _hidden(self, index: int) -> torch.Tensor:
        call = self._calls[index]
        block = blocks(self.model)[1][index]
        hidden: torch.Tensor = call["args"][0] if "args" in call else call[residual_argument(block)]
        return hidden

    def _runs(self, index: int, hidden: torch.Tensor) -> bool:
        block, call = blocks(self.model)[1][index], dict(self._calls[index])
        args = call.pop("args", ())
        try:
            if args:
                output = block(hidden, *args[1:], **call)
            else:
                output = block(**{**call, residual_argument(block): hidden})
        except REFUSALS:  # as code may refuse a length, by an assertion too
            return False
        made = output[0] if isinstance(output, tuple) else output
        return isinstance(made, torch.Tensor) and made.shape == hidden.shape
