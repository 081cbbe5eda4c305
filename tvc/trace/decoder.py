"""Captures the decoder: one graph for prefill, decode steps and later turns, and the token embedding beside it.

Chunks enter left-packed (pads first, the last slot always real). Masks never come from the model: attention is masked
by `0 <= key_position <= query_position`, so a stage's cache may have any length. The visual tokens of the chunk are
named by `visual_index`; a decode step has none and every reduction is then the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

import tvc.kernels.attention_mask  # noqa: F401  registers torch.ops.tvc.attention_mask
from tvc.chunks import (
    CROSS_MASK,
    CROSS_ROWS,
    CROSS_STATES,
    PAST_POSITIONS,
    SPANS,
    DecoderShape,
    sample_inputs,
    varying_axes,
)
from tvc.errors import TraceError
from tvc.graphs import drop_checks
from tvc.program import Component
from tvc.trace.attention import decoder_masks
from tvc.trace.crossing import crossing_arguments
from tvc.trace.extras import arguments, on_all_slots
from tvc.trace.host import Boundary
from tvc.trace.vision import AUTO, export, tracing


class DecoderPath(torch.nn.Module):
    """The model's own forward from embeddings to the last slot's logits, with caches as plain tensors."""

    def __init__(
        self,
        model: torch.nn.Module,
        boundary: Boundary,
        shape: DecoderShape,
        names: tuple[str, ...],
        nesting: Mapping[str, Any],
        windows: Iterable[int],
    ):
        super().__init__()
        self.model, self._windows = model, sorted({0, *windows})
        self._boundary, self._shape, self._names, self._nesting = boundary, shape, names, nesting

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self._names, tensors, strict=True))
        position_ids, query_positions = given["position_ids"], given["query_positions"]
        valid = query_positions >= 0
        cache = _cache(self._shape, given, valid)
        keys = torch.cat([given[f"{PAST_POSITIONS}0"], query_positions], 1)
        masks: dict[int, torch.Tensor] = {}
        asked: set[int] = set()

        def asked_for(window: int) -> torch.Tensor:
            asked.add(window)
            return mask(window)

        def mask(window: int) -> torch.Tensor:
            if window not in masks:
                masks[window] = torch.ops.tvc.attention_mask(query_positions, keys, window, given.get(SPANS))
            return masks[window]

        for window in self._windows:  # in front of every block, where a cut in front of the first one finds them
            mask(window)
        extras = self._shape.extras
        decoder = self.model.get_submodule(self._boundary.decoder)
        by_kind = _by_kind(decoder, mask(0), valid)
        own = {"position_ids": position_ids, **arguments(extras, given, self._nesting)}
        crossed, crossing = None, self._shape.crossing
        if crossing is not None:
            crossed = given[CROSS_MASK].unsqueeze(1)
            own |= crossing_arguments(crossing, given[CROSS_STATES], crossed, given[CROSS_ROWS])

        def own_arguments(_module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "attention_mask": by_kind, **own}

        handle = decoder.register_forward_pre_hook(own_arguments, with_kwargs=True)
        try:
            with decoder_masks(asked_for, crossed), on_all_slots(extras):
                out = self.model.get_submodule(self._boundary.language)(
                    inputs_embeds=given["inputs_embeds"],
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            handle.remove()
        unasked = set(self._windows) - asked - {0}
        if unasked:
            raise TraceError(
                "layers of the decoder have a window that their attention does not tell",
                where="decoder",
                got=f"windows of {', '.join(map(str, sorted(unasked)))} tokens in the configuration alone",
                want="attention that is called with sliding_window",
                fix="this model cannot be compiled: its window would be lost",
                slug="untold-window",
            )
        return out.logits, keys, *(tensor for layer in cache.layers for tensor in _held(layer))


def _by_kind(decoder: torch.nn.Module, mask: torch.Tensor, valid: torch.Tensor) -> Any:
    """What the decoder takes as attention mask: one for all layers, or by kind where some only ask what is padding."""
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    blind = {kind for kind in kinds if "attention" not in kind or kind.startswith("linear")}
    return {kind: valid if kind in blind else mask for kind in kinds} if blind else mask


class _State(LinearAttentionLayer):
    """The cache of a convolution, without writes: `past` [B, C, L] holds its last inputs, `valid` [B, S] says which
    slots of the chunk are no padding. The past stands next to the first real slot, padding in front of both.
    """

    def __init__(self, past: torch.Tensor, valid: torch.Tensor):
        super().__init__()
        self.present, self.valid = past, valid

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **_options: Any) -> torch.Tensor:
        """[B, C, L + S] the past and the chunk, from which the convolution takes its windows."""
        past = self.present
        length = past.shape[2]
        joined = torch.cat([past, conv_states], 2)
        pads = (~self.valid).sum(1, keepdim=True)
        place = torch.arange(joined.shape[2], device=past.device).unsqueeze(0)
        moved = torch.where(place < pads, place + length, torch.where(place < pads + length, place - pads, place))
        joined = joined.gather(2, moved.unsqueeze(1).expand(-1, joined.shape[1], -1))
        self.present = joined[:, :, joined.shape[2] - length :]
        return joined


def _cache(shape: DecoderShape, given: Mapping[str, torch.Tensor], valid: torch.Tensor) -> DynamicCache:
    """A cache that already holds the past of every layer."""
    cache = DynamicCache()
    cache.layers = []
    for index in range(len(shape.caches)):
        past = [given[f"past_{name}"] for name in shape.cached(index)]
        if shape.holds_state(index):
            cache.layers.append(_State(past[0], valid))
            continue
        layer = cache.layer_class_to_replicate()
        cache.layers.append(layer)
        if not past:  # the layer reads the keys and values that an earlier one has just updated
            continue
        layer.keys, layer.values = past
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    return cache


def _held(layer: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of one layer's cache, in the order of `DecoderShape.cached`."""
    if isinstance(layer, _State):
        return (layer.present.clone(),)
    return (layer.keys, layer.values) if layer.keys is not None else ()


def capture_decoder(
    model: torch.nn.Module,
    boundary: Boundary,
    shape: DecoderShape,
    nesting: Mapping[str, Any],
    windows: Iterable[int],
) -> Component:
    """The decoder component, one stage long.

    Args:
        nesting: how the decoder takes its extras (`tvc.trace.extras.structure`).
        windows: sliding windows of its layers.
    """
    layers = len(shape.caches)
    present = tuple(name for layer in range(layers) for name in shape.cached(layer))
    names = (*shape.chunk_inputs, f"{PAST_POSITIONS}0", *(f"past_{name}" for name in present))
    sample = sample_inputs(names, shape, [0] * layers, {})
    dynamic = tuple(dict.fromkeys(varying_axes(name, shape), AUTO) for name in names)
    module = DecoderPath(model, boundary, shape, names, nesting, windows)
    with tracing(model):
        exported = export("decoder", module, sample, (dynamic,))
    drop_checks(exported)
    outputs = ("logits", "key_positions.0", *present)
    return Component("decoder", exported, names, outputs, sample, dynamic, meta={"shape": shape})


class Embedding(torch.nn.Module):
    def __init__(self, embedding: torch.nn.Module):
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.embedding(input_ids),)


def capture_embeddings(model: torch.nn.Module, paths: Sequence[str]) -> dict[str, Component]:
    """The token embedding (input_ids [B, S] -> inputs_embeds [B, S, D]) and other tables that are looked up by token.

    The first of `paths` is the token embedding and becomes the component `embed`, the others `embed_1` and so on.
    """
    made = {}
    for number, path in enumerate(paths):
        embedding = model.get_submodule(path)
        sample = (torch.zeros(2, 3, dtype=torch.long, device=next(embedding.parameters()).device),)
        dynamic = ({0: AUTO, 1: AUTO},)
        name = embedding_component(number)
        with tracing(model):
            exported = export(name, Embedding(embedding), sample, dynamic)
        made[name] = Component(name, exported, ("input_ids",), ("inputs_embeds",), sample, dynamic)
    return made


def embedding_component(number: int) -> str:
    return f"embed_{number}" if number else "embed"
