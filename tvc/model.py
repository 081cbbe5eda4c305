"""A compiled model: called and generated with like the Hugging Face model it was made from."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tvc.errors import ArgumentError
from tvc.runtime.engine import Engine


class ReducedOutput(CausalLMOutputWithPast):
    """`logits` [B, 1, vocabulary] of the last token, `past_key_values` (a `StagedCache`) and `kept`.

    `kept[site]` is [B, T] int64, -1 padded: for a decoder site the places in the sequence (columns of `input_ids`,
    earlier turns counted in) of every token, text and visual, that stays from there on, ascending; for `vision.K` and
    `projector` the numbers of the sample's visual tokens that stay.
    """

    kept: dict[str, torch.Tensor] | None = None


def generating(engine: Engine, generation_config: GenerationConfig | None, device: torch.device) -> Any:
    """The host model made callable: its own class, so that `generate` prepares inputs as the family does."""
    host = engine.host.model
    family = type(host)

    @functools.wraps(family.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in _signature(family) if name != "self"]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        answer = engine.call(inputs)
        return ReducedOutput(logits=answer.logits, past_key_values=answer.cache, kept=answer.kept)

    members = {
        "forward": forward,
        "device": property(lambda self: device),
        "dtype": property(lambda self: engine.interface.shape.dtype),
        # Pixels go to `forward`, whose answer says what was dropped, instead of being encoded beforehand.
        "_supports_mm_encoder_outputs": lambda self: False,
        "__module__": family.__module__,
    }
    host.__class__ = type(family.__name__, (family,), members)
    if generation_config is not None:
        host.generation_config = generation_config
    return host


@functools.cache
def _signature(family: type) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(family.forward).parameters)


def refuse_modes(kwargs: dict[str, Any]) -> None:
    """Generation modes that a reduced cache cannot serve are refused by name."""
    refused = {
        "assistant_model": "assisted decoding takes tokens back out of the cache",
        "prompt_lookup_num_tokens": "prompt lookup takes tokens back out of the cache",
        "cache_implementation": "a compiled model keeps its own cache, one length per stage",
    }
    for name, reason in refused.items():
        if kwargs.get(name) is not None:
            raise ArgumentError(
                f"generate cannot take {name} here: {reason}",
                where=f"generate({name}=...)",
                got=kwargs[name],
                want="greedy search, sampling or beam search",
                fix=f"leave {name} out",
                slug="no-such-mode",
            )
