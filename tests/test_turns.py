"""A later turn on a model with several rotary axes, by hand: the cache of a padded batch is handed back."""

from __future__ import annotations

import torch

import support
import tvc


def test_a_second_turn_of_a_padded_batch_equals_one_longer_prompt() -> None:
    """Random scores do not look at the text, so both keep the same visual tokens."""
    model, processor = support.build("qwen2_5_vl")
    policy = tvc.load_policy("random", ["at=language.2", "keep=50%"])
    compiled = tvc.compile(model, policy, processor=processor, verify=False)
    first = support.inputs("qwen2_5_vl", 3)
    more = torch.full((3, 2), 7)
    mask = torch.cat([first["attention_mask"], torch.ones_like(more)], 1)
    cache = compiled(**first).past_key_values
    second = compiled(input_ids=more, attention_mask=mask, past_key_values=cache)
    whole = {**first, "input_ids": torch.cat([first["input_ids"], more], 1), "attention_mask": mask}
    kinds = first["mm_token_type_ids"]
    whole["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(more, dtype=kinds.dtype)], 1)
    torch.testing.assert_close(second.logits, compiled(**whole).logits, atol=2e-5, rtol=2e-5)
