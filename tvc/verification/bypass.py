"""Tokens that pass by some decoder layers, said of the untouched model: nobody sees them there, and behind the layers
they are put back as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tvc.verification.steps import Sample


class Bypass:
    """The tokens of one batch that are passing by; there are none where no step says `until`."""

    def __init__(self, steps: Sequence[Any]):
        """`steps`: of a resolved policy."""
        inside = [(_layer(step.at), step) for step in steps if step.at.startswith("language.")]
        self.ends = {layer: _layer(step.until) for layer, step in inside if step.until}
        self.cuts = [(layer, self.ends.get(layer)) for layer, _ in inside]
        self.end = -1  # the layer in front of which those under way come back
        self.left: tuple[torch.Tensor, torch.Tensor, list[Sample]]

    def reduced(self, layer: int) -> bool:
        """Whether a cut has left fewer tokens to the layer than entered the decoder."""
        return any(cut <= layer and (end is None or layer < end) for cut, end in self.cuts)

    def leaving(self, layer: int, hidden: torch.Tensor, alive: torch.Tensor, samples: Sequence[Sample]) -> None:
        """Notes what stands in front of the steps at `layer`, where these let tokens pass by.

        Args:
            hidden: [B, S, D] what enters the layer.
            alive: [B, S] bool, columns that are there.
            samples: their visual tokens.
        """
        if layer in self.ends:
            self.end, self.left = self.ends[layer], (hidden, alive.clone(), list(samples))

    def back(self, layer: int, hidden: torch.Tensor, alive: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
        """[B, S, D] what enters `layer`; where tokens come back there, `alive` and `samples` are as they were."""
        if layer != self.end:
            return hidden
        before, there, samples[:] = self.left
        passed = there & ~alive
        alive |= passed
        return torch.where(passed[:, :, None], before, hidden)


def _layer(site: str) -> int:
    return int(site.removeprefix("language."))
