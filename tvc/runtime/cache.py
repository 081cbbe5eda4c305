"""The cache of a compiled decoder: every stage holds as many tokens as its cuts left it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

from tvc.errors import InputError


class StagedCache(Cache):
    """Keys and values per layer, key positions per stage.

    `layers[i].keys` is [B, G, P_s, d] with P_s the length of the stage that layer i belongs to. `get_seq_length()` is
    the number of sequence places seen so far, reduced tokens counted in: positions and masks go on from there.
    """

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        key_positions: Sequence[torch.Tensor],
        seen: int,
    ):
        layers = []
        for key, value in zip(keys, values, strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = key, value, True
            layer.dtype, layer.device = key.dtype, key.device
            layers.append(layer)
        super().__init__(layers=layers)
        self.key_positions = list(key_positions)  # [B, P_s] int64 sequence place of every cached token, -1 pads
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The model's own code makes masks over the whole sequence, whatever the layers have left of it."""
        return self.seen + query_length, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.key_positions = [positions[indices] for positions in self.key_positions]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.key_positions = [positions.repeat_interleave(repeats, dim=0) for positions in self.key_positions]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for layer in self.layers:
            layer.keys = layer.keys.index_select(0, beam_idx.to(layer.keys.device))
            layer.values = layer.values.index_select(0, beam_idx.to(layer.values.device))
        self.key_positions = [p.index_select(0, beam_idx.to(p.device)) for p in self.key_positions]

    def crop(self, tokens_to_remove: int) -> None:
        raise InputError(
            "tokens cannot be taken back out of a reduced cache",
            where="past_key_values.crop",
            got=f"crop({tokens_to_remove})",
            want="a generation mode that only appends",
            fix="use greedy search, sampling or beam search; assisted decoding rolls its cache back",
            slug="no-rollback",
        )
