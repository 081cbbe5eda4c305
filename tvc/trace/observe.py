"""Sees and changes what flows into the blocks of an untouched model, for the length of one call.

The model's attention is replaced by a function that looks at query, key and value and then calls the same attention
that the model would have used. Everything else are hooks, which are gone afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tvc.trace.attention import attention_as
from tvc.trace.layout import blocks

NAME = "tvc_observed"


@dataclasses.dataclass
class Seen:
    """One call of an attention."""

    query: torch.Tensor  # [B, H, Q, d]
    key: torch.Tensor  # [B, G, N, d]
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float = 0.0  # what a hyperbolic tangent keeps logits within; 0: they are as they are
    window: int = 0  # keys that a query sees at most, itself and those before it; 0: any number


class Observer:
    """What to do at each block and each attention; the defaults change nothing. `component` is language or vision."""

    silent = False  # attention gives zeros, so that blocks act on every token by itself

    def entering(self, component: str, index: int, block: torch.nn.Module, arguments: dict[str, Any]) -> None:
        """Before block `index` runs on `arguments`, which may be changed."""

    def leaving(self, component: str, index: int, output: Any) -> Any:
        """After block `index` gave `output`; what is returned takes its place, None leaves it."""
        return None

    def attention(self, component: str, index: int, seen: Seen) -> torch.Tensor | None:
        """The mask to attend with; queries, keys and values are those of `seen`, which may be changed."""
        return seen.mask


@dataclasses.dataclass
class _Ambient:
    observer: Observer | None = None
    place: tuple[str, int] | None = None


_AMBIENT = _Ambient()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    observer, place = _AMBIENT.observer, _AMBIENT.place
    if observer is not None and place is not None:
        scale = kwargs.get("scaling")
        scale = float(scale) if scale is not None else query.shape[-1] ** -0.5
        window = int(kwargs.get("sliding_window") or 0)
        seen = Seen(query, key, value, attention_mask, scale, float(kwargs.get("softcap") or 0.0), window)
        attention_mask = observer.attention(*place, seen)
        query, key, value, kwargs = seen.query, seen.key, seen.value, {**kwargs, "scaling": scale}
        if observer.silent:
            batch, heads, length, _ = query.shape
            return query.new_zeros(batch, length, heads, value.shape[-1]), None
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux")):  # only the family's own code has these
        own = sys.modules[type(module).__module__].eager_attention_forward
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
        made: tuple[torch.Tensor, torch.Tensor | None] = own(module, query, key, value, attention_mask, **kwargs)
        return made
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The model's own mask, always as a tensor."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def named_arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a block by name."""
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


@contextlib.contextmanager
def observed(model: torch.nn.Module, observer: Observer) -> Iterator[None]:
    """Calls of `model` inside the block report to `observer`."""
    handles = []

    def before(component: str, index: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            arguments = named_arguments(module, args, kwargs)
            _AMBIENT.place = (component, index)
            observer.entering(component, index, module, arguments)
            names = list(arguments)[: len(args)]  # what came by place stays in place: the model's own hooks look there
            return tuple(arguments.pop(name) for name in names), arguments

        return hook

    def after(component: str, index: int) -> Callable[..., Any]:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
            _AMBIENT.place = None
            return observer.leaving(component, index, output)

        return hook

    for component, stack in zip(("language", "vision"), blocks(model), strict=True):
        for index, block in enumerate(stack):
            handles.append(block.register_forward_pre_hook(before(component, index), with_kwargs=True))
            handles.append(block.register_forward_hook(after(component, index)))
    _AMBIENT.observer = observer
    try:
        with attention_as(model, NAME):
            yield
    finally:
        _AMBIENT.observer, _AMBIENT.place = None, None
        for handle in handles:
            handle.remove()


def plain_cache(model: Any) -> DynamicCache:
    """An empty cache for `model` that forgets nothing, sliding windows included."""
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [DynamicLayer() if isinstance(layer, DynamicLayer) else layer for layer in cache.layers]
    return cache


def cached_state(layer: Any) -> torch.Tensor | None:
    """[B, C, L] what a layer of a cache holds in the place of keys and values, None where it holds those."""
    return layer.conv_states[0] if isinstance(layer, LinearAttentionLayer) else None


@contextlib.contextmanager
def kept_offsets(model: torch.nn.Module) -> Iterator[None]:
    """Some families remember position offsets of the last prompt; behind the block they are what they were."""
    holders: list[tuple[Any, Any]] = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    try:
        yield
    finally:
        for module, value in holders:
            module.rope_deltas = value


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The instance attribute `name` of `owner` is `value` for the length of the block."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
