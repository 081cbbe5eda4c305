"""The cache of a compiled decoder: every stage holds as many tokens as its cuts left it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from tvc.chunks import DecoderShape
from tvc.errors import InputError


class StagedCache(Cache):
    """Keys and values per layer, key positions per stage.

    `layers[i].keys` is [B, G, P_s, d] with P_s the length of the stage that layer i belongs to; a layer without
    attention holds `conv_states[0]` [B, C, L]. `get_seq_length()` is the number of sequence places seen so far, reduced
    tokens counted in: positions and masks go on from there.
    """

    def __init__(
        self,
        shape: DecoderShape,
        held: Mapping[str, torch.Tensor],
        key_positions: Sequence[torch.Tensor],
        seen: int,
        crossed: torch.Tensor | None = None,
        offered: int = 0,
        saved: torch.Tensor | None = None,
        marks: Mapping[str, torch.Tensor] | None = None,
    ):
        """`held` has the cache of every layer by the names of `DecoderShape.cached`.

        `marks` are what else the decoder has to know, by the names of its outputs: of cached tokens [B, P_s], and what
        steps remember of earlier calls [B, ...].
        `saved` [B] int64 are the positions that visual tokens have saved, where they take fractions of one.
        """
        layers = []
        for index in range(len(shape.caches)):
            tensors = [held[name] for name in shape.cached(index)]
            if crossed is not None and shape.crosses(index):  # without the column that stands for none
                tensors = [tensor[:, :, : crossed.shape[1]] for tensor in tensors]
            layers.append(_layer(tensors))
        super().__init__(layers=layers)
        self.key_positions = list(key_positions)  # [B, P_s] int64 sequence place of every cached token, -1 pads
        self.seen, self.saved = seen, saved
        self.marks = dict(marks or {})
        self.crossed = crossed  # [B, C] int64 number of every visual token that layers with cross-attention cache
        self.offered = offered  # visual tokens that each sample was given for them so far, reduced ones counted in

    def tensor(self, name: str) -> torch.Tensor:
        """What the cache input `past_key.i`, `past_value.i` or `past_state.i` takes."""
        kind, _, layer = name.partition(".")
        held: dict[str, torch.Tensor] = _tensors(self.layers[int(layer)])
        return held[kind.removeprefix("past_")]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The model's own code makes masks over the whole sequence, whatever the layers have left of it."""
        return self.seen + query_length, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick(torch.arange(len(self.key_positions[0])).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._pick(beam_idx)

    def _pick(self, rows: torch.Tensor) -> None:
        def picked(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        self.layers: list[Any] = [
            _layer([picked(tensor) for tensor in _tensors(layer).values()]) for layer in self.layers
        ]
        self.key_positions = [picked(positions) for positions in self.key_positions]
        self.crossed = picked(self.crossed) if self.crossed is not None else None
        self.saved = None if self.saved is None else picked(self.saved)
        self.marks = {name: picked(mark) for name, mark in self.marks.items()}

    def crop(self, tokens_to_remove: int) -> None:
        raise InputError(
            "tokens cannot be taken back out of a reduced cache",
            where="past_key_values.crop",
            got=f"crop({tokens_to_remove})",
            want="a generation mode that only appends",
            fix="use greedy search, sampling or beam search; assisted decoding rolls its cache back",
            slug="no-rollback",
        )


def remembered(past: StagedCache | None, name: str, shape: DecoderShape, batch: int) -> torch.Tensor:
    """What the input `name` takes of the calls before; zeros where there were none.

    Raises:
        InputError: the cache is of a model without this memory.
    """
    if past is None:
        return shape.empty_memory(name, batch)
    held = past.marks.get(name.removeprefix("past_"))
    if held is None:
        raise InputError(
            "the cache holds nothing of what this model's steps remember",
            where="past_key_values",
            got=f"a cache with {', '.join(past.marks) or 'keys and values alone'}",
            want=name.removeprefix("past_"),
            fix="hand back the past_key_values of an earlier answer of this model, or run the whole prompt again",
            slug="foreign-cache",
        )
    return held


def _layer(held: Sequence[torch.Tensor]) -> DynamicLayer | LinearAttentionLayer:
    if not held:
        return DynamicLayer()
    if len(held) == 2:
        layer = DynamicLayer()
        layer.keys, layer.values = held
        layer.is_initialized, layer.dtype, layer.device = True, held[0].dtype, held[0].device
        return layer
    state = LinearAttentionLayer()
    state.conv_states[0] = held[0]
    state.is_conv_states_initialized[0] = state.has_previous_state[0] = True
    state.conv_kernel_size[0], state.dtype, state.device = held[0].shape[2], held[0].dtype, held[0].device
    return state


def _tensors(layer: Any) -> dict[str, torch.Tensor]:
    """What a layer holds, by kind, in the order of `DecoderShape.cached`."""
    if isinstance(layer, LinearAttentionLayer):
        return {"state": layer.conv_states[0]}
    return {"key": layer.keys, "value": layer.values} if layer.keys is not None else {}
