"""Frequencies of a decoder's rotary embedding: whether they can be rescaled, and the decoder with rescaled ones."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tvc.errors import TraceError


def fixed(decoder: torch.nn.Module) -> str:
    """Why the frequencies are those that they are; empty where they can be others."""
    found = rotary(decoder)
    if len(found) != 1:
        return f"it has {len(found)} rotary embeddings" if found else "it has no rotary embedding of all its layers"
    kind = getattr(found[0], "rope_type", None)
    if not isinstance(getattr(found[0], "inv_freq", None), torch.Tensor) or not hasattr(found[0], "attention_scaling"):
        return "its rotary embedding does not keep one list of frequencies"
    return "" if kind == "default" else f"its frequencies are rescaled already ({kind})"


def rotary(decoder: torch.nn.Module) -> list[Any]:
    """The rotary embeddings that all layers share."""
    return [part for name, part in decoder.named_children() if "rotary" in name]


@contextlib.contextmanager
def rescaled(decoder: torch.nn.Module, factor: float, window: int | None, fast: float, slow: float) -> Iterator[None]:
    """Inside the block the decoder, of which `fixed` says nothing, turns by rescaled frequencies.

    Args:
        factor: by how much longer than the model's own window prompts shall be.
        window: positions of that window; None: the model's `max_position_embeddings`.
        fast, slow: turns within the window from which on a frequency stays, and up to which it is divided by `factor`.
    """
    (module,) = rotary(decoder)
    before, config = (module.inv_freq, module.attention_scaling), copy.deepcopy(module.config)
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": window or config.max_position_embeddings,
        "beta_fast": fast,
        "beta_slow": slow,
    }
    make = ROPE_INIT_FUNCTIONS["yarn"]
    plain, _ = make(config, before[0].device)
    # Of a family that orders or stretches its frequencies in a way of its own, nobody knows which one is which.
    if plain.shape != before[0].shape or not torch.allclose(plain, before[0].float(), rtol=1e-2):
        raise TraceError(
            "the frequencies of the decoder's rotary embedding are not those of its base",
            where=type(module).__name__,
            got=f"{len(before[0])} frequencies of an order or scale of their own",
            want="powers of rope_theta",
            fix="write positions: keep",
            slug="own-frequencies",
        )
    config.rope_parameters["factor"] = factor
    module.inv_freq, module.attention_scaling = make(config, before[0].device)
    try:
        yield
    finally:
        module.inv_freq, module.attention_scaling = before
