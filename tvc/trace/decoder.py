"""Captures the decoder: one graph for prefill, decode steps and later turns, and the token embedding beside it.

Chunks enter left-packed (pads first, the last slot always real). Masks never come from the model: attention is masked
by `0 <= key_position <= query_position`, so a stage's cache may have any length. The visual tokens of the chunk are
named by `visual_index`; a decode step has none and every reduction is then the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

import tvc.kernels.attention_mask  # noqa: F401  registers torch.ops.tvc.attention_mask
from tvc.chunks import PAST_KEY, PAST_POSITIONS, PAST_VALUE, SPANS, DecoderShape, sample_inputs, varying_axes
from tvc.graphs import drop_checks
from tvc.program import Component
from tvc.trace.attention import decoder_masks
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
    ):
        super().__init__()
        self.model = model
        self._decoder_path, self._shape, self._names, self._nesting = boundary.decoder, shape, names, nesting

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self._names, tensors, strict=True))
        position_ids, query_positions = given["position_ids"], given["query_positions"]
        cache = _cache(tuple(value for name, value in given.items() if name.startswith((PAST_KEY, PAST_VALUE))))
        keys = torch.cat([given[f"{PAST_POSITIONS}0"], query_positions], 1)
        masks: dict[int, torch.Tensor] = {}

        def mask(window: int) -> torch.Tensor:
            if window not in masks:
                masks[window] = torch.ops.tvc.attention_mask(query_positions, keys, window, given.get(SPANS))
            return masks[window]

        extras = self._shape.extras
        own = {"position_ids": position_ids, **arguments(extras, given, self._nesting)}

        def own_arguments(_module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "attention_mask": mask(0), **own}

        handle = self.model.get_submodule(self._decoder_path).register_forward_pre_hook(own_arguments, with_kwargs=True)
        try:
            with decoder_masks(mask), on_all_slots(extras):
                out = self.model(
                    inputs_embeds=given["inputs_embeds"],
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            handle.remove()
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return out.logits, keys, *present


def _cache(past: tuple[torch.Tensor, ...]) -> DynamicCache:
    """A cache that already holds `past`: key and value of every layer, in turn, [B, G, P, d]."""
    cache = DynamicCache()
    cache.layers = []
    for index in range(0, len(past), 2):
        layer = cache.layer_class_to_replicate()
        layer.keys, layer.values = past[index], past[index + 1]
        layer.dtype, layer.device, layer.is_initialized = past[index].dtype, past[index].device, True
        cache.layers.append(layer)
    return cache


def capture_decoder(
    model: torch.nn.Module, boundary: Boundary, shape: DecoderShape, nesting: Mapping[str, Any]
) -> Component:
    """The decoder component, one stage long; `nesting` says how the decoder takes its extras."""
    layers = len(shape.caches)
    names = (
        *shape.chunk_inputs,
        f"{PAST_POSITIONS}0",
        *(name for i in range(layers) for name in (f"{PAST_KEY}{i}", f"{PAST_VALUE}{i}")),
    )
    sample = sample_inputs(names, shape, [0] * layers, {})
    dynamic = tuple(dict.fromkeys(varying_axes(name, shape), AUTO) for name in names)
    module = DecoderPath(model, boundary, shape, names, nesting)
    with tracing(model):
        exported = export("decoder", module, sample, (dynamic,))
    drop_checks(exported)
    outputs = ("logits", "key_positions.0", *(name for i in range(layers) for name in (f"key.{i}", f"value.{i}")))
    return Component("decoder", exported, names, outputs, sample, dynamic, meta={"shape": shape})


class Embedding(torch.nn.Module):
    def __init__(self, embedding: torch.nn.Module):
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.embedding(input_ids),)


def capture_embedding(model: torch.nn.Module) -> Component:
    """The token embedding: input_ids [B, S] -> inputs_embeds [B, S, D]."""
    embedding = model.get_input_embeddings()
    sample = (torch.zeros(2, 3, dtype=torch.long, device=next(embedding.parameters()).device),)
    dynamic = ({0: AUTO, 1: AUTO},)
    with tracing(model):
        exported = export("embed", Embedding(embedding), sample, dynamic)
    return Component("embed", exported, ("input_ids",), ("inputs_embeds",), sample, dynamic)
