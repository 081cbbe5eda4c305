"""How a model's attention is seen while tracing: every call becomes one node of the graph.

HF models look their attention up by name (`config._attn_implementation`). For the time of a trace all configurations
of the model name `tvc_flash`: the word "flash" makes packed encoders hand over their segment boundaries instead of
looping over them, and the mask builders still give the mask that the scaled-dot-product path would get.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tvc.kernels.attention  # noqa: F401  registers torch.ops.tvc.attention
from tvc.errors import TraceError

NAME = "tvc_flash"


@dataclasses.dataclass
class _Ambient:
    """The decoder's masks while it is traced: `mask(window)` gives the one for a layer; None outside a decoder.

    `crossing` is that of layers with cross-attention, which the model's own code hands to them.
    """

    mask: Callable[[int], torch.Tensor] | None = None
    crossing: torch.Tensor | None = None


_AMBIENT = _Ambient()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    unknown = [name for name in ("s_aux", "position_bias", "sinks") if kwargs.get(name) is not None]
    if unknown:
        raise TraceError(
            f"the attention of {type(module).__name__} takes {unknown[0]}, which the attention op does not have",
            where=type(module).__name__,
            got=unknown[0],
            want="query, key, value, mask, scale and soft cap",
            fix="compile a model without attention sinks or position biases",
            slug="unknown-attention",
        )
    softcap = float(kwargs.get("softcap") or 0.0)
    if kwargs.get("cu_seq_lens_q") is not None:
        boundaries = kwargs["cu_seq_lens_q"]
        output = torch.ops.tvc.packed_attention(query, key, value, boundaries, scale)
    else:
        crosses = attention_mask is not None and attention_mask is _AMBIENT.crossing
        if _AMBIENT.mask is not None and not crosses:
            attention_mask = _AMBIENT.mask(int(kwargs.get("sliding_window") or 0))
        elif attention_mask is None and (kwargs.get("is_causal") or getattr(module, "is_causal", False)):
            size = query.shape[2]
            attention_mask = torch.ones(size, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        output = torch.ops.tvc.attention(query, key, value, attention_mask, scale, softcap)
    return output.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask as a tensor, never skipped because of what the sample happens to hold; None where nothing is hidden
    from anything, whatever it holds.
    """
    hides = kwargs.get("attention_mask") is not None or kwargs.get("local_size") is not None
    if kwargs.get("allow_is_bidirectional_skip") and not hides:
        return None
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


@contextlib.contextmanager
def attention_as(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Every configuration inside `model` names the attention implementation `name` for the duration of the block."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    field = "_attn_implementation_internal"
    before = {key: getattr(config, field, None) for key, config in configs.items()}
    for config in configs.values():
        setattr(config, field, name)
    try:
        yield
    finally:
        for key, config in configs.items():
            setattr(config, field, before[key])


@contextlib.contextmanager
def decoder_masks(mask: Callable[[int], torch.Tensor], crossing: torch.Tensor | None = None) -> Iterator[None]:
    """Attention calls inside the block take `mask(window)` whatever mask the model made, all but those that it hands
    the mask `crossing`.
    """
    _AMBIENT.mask, _AMBIENT.crossing = mask, crossing
    try:
        yield
    finally:
        _AMBIENT.mask, _AMBIENT.crossing = None, None
