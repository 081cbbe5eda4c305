"""Text that reads visual keys unrotated, by hand: every key stands there turned and raw, and each query sees one.

Query and key before they are turned are those that the untouched block makes with every token at position 0. Beside
the turned ones they make vectors of twice the width, of which each key has one half alone: one softmax runs over both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from tvc.trace.observe import Seen
from tvc.verification.steps import Sample


class UnrotatedKeys:
    """One prompt and what was generated behind it, which is text."""

    def __init__(self) -> None:
        self.visual = torch.empty(0)  # [B, S] bool
        self.keys: dict[int, torch.Tensor] = {}  # per layer [B, G, S, d] raw
        self._raw: Seen | None = None
        self._looking = False

    def enter(self, samples: Sequence[Sample], hidden: torch.Tensor) -> None:
        """Notes the visual tokens that enter the first block, whose hidden states are `hidden` [B, S, D]."""
        self.visual = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for sample in samples:
            self.visual[sample.row, sample.slots] = True

    def look(self, block: torch.nn.Module, arguments: dict[str, Any], unturned: Any) -> None:
        """Runs `block` once with the position embeddings `unturned`, for its own query and key."""
        given = {**arguments, "position_embeddings": unturned}
        given.pop("past_key_values", None)  # they come once more, turned
        self._looking = True
        block.forward(**given)
        self._looking = False

    def attend(self, layer: int, seen: Seen) -> torch.Tensor | None:
        """The mask to attend with; query, key and value of `seen` become those of both kinds."""
        if self._looking:
            self._raw = dataclasses.replace(seen)
            return seen.mask
        raw, self._raw = self._raw, None
        if raw is None or seen.mask is None:  # a look at the values alone
            return seen.mask
        mask = seen.mask if seen.mask.dtype == torch.bool else seen.mask >= 0
        pairs = (self.visual[:, None, :] & ~self.visual[:, :, None])[:, None]
        width = seen.key.shape[3]
        seen.query = torch.cat([seen.query, raw.query], 3)
        seen.key = torch.cat([pad(seen.key, (0, width)), pad(raw.key, (width, 0))], 2)
        seen.value = torch.cat([seen.value, seen.value], 2)
        self.keys[layer] = raw.key
        return torch.cat([mask & ~pairs, mask & pairs], 3)

    def put(self, cache: Any) -> None:
        """Puts raw keys of visual tokens into the untouched model's `cache`."""
        for layer, raw in self.keys.items():
            own = cache.layers[layer]
            own.keys = torch.where(self.visual[:, None, :, None], raw, own.keys)
