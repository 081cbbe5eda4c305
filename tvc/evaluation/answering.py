"""Asks a model, dense or compiled, for the answers to a batch of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tvc.evaluation.tasks import Example
from tvc.runtime.prompts import prepared_batch


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said: its text, and the id of its first token."""

    text: str
    first: int


@torch.no_grad()
def ask(
    model: Any, processor: Any, examples: Sequence[Example], device: torch.device, dtype: torch.dtype, new_tokens: int
) -> list[Reply]:
    """One reply an example, by greedy search of at most `new_tokens` tokens; the examples run as one batch."""
    inputs = prepared_batch(processor, [one.image for one in examples], [one.question for one in examples])
    moved = {name: _moved(value, device, dtype) for name, value in inputs.items()}
    ids = model.generate(**moved, max_new_tokens=new_tokens, do_sample=False)
    new = ids[:, moved["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [Reply(text.strip(), int(row[0])) for text, row in zip(texts, new, strict=True)]


def prompt_tokens(processor: Any, examples: Sequence[Example], visual: int) -> int:
    """The mean number of text tokens in the prompts, where each image takes `visual` tokens."""
    inputs = prepared_batch(processor, [one.image for one in examples], [one.question for one in examples])
    return max(1, round(float(inputs["attention_mask"].sum(1).float().mean())) - visual)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not torch.is_tensor(value):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
