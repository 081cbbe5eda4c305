"""Prefill and decode of a model as timed variants: any callable with the signature of a Hugging Face model will do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tvc.report.timing import Variant

PHASES = ("prefill", "decode")


def phases(model: Callable[..., Any], inputs: Mapping[str, torch.Tensor], **options: Any) -> dict[str, Variant]:
    """`prefill`: one call on the prompt. `decode`: one token more, over a fresh copy of the cache that prefill left.

    Args:
        model: called with the inputs; its result has `logits [B, S, vocabulary]` and `past_key_values`.
        inputs: what the processor gives, `input_ids` and `attention_mask` among them.
        options: for every call, such as `logits_to_keep=1` for an untouched model.
    """
    with torch.no_grad():
        first = model(**inputs, **options)
    token = first.logits[:, -1:].argmax(-1)
    mask = inputs["attention_mask"]
    longer = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)

    def prefill(_: None) -> Any:
        with torch.no_grad():
            return model(**inputs, **options)

    def decode(cache: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=token, attention_mask=longer, past_key_values=cache, **options)

    return {"prefill": Variant(prefill), "decode": Variant(decode, lambda: copy.deepcopy(first.past_key_values))}


def in_sequence(variants: Sequence[Variant]) -> Variant:
    """One variant that calls several, one after the other."""
    return Variant(
        lambda given: [variant.call(argument) for variant, argument in zip(variants, given, strict=True)],
        lambda: [variant.setup() for variant in variants],
    )
