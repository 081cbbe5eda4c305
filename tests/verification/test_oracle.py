"""The oracle's single call over prompt and answer, beside the untouched model that writes one token after another."""

from __future__ import annotations

import types

import pytest
import torch

import support
from tvc.trace.sample import visual_token_ids
from tvc.verification import samples
from tvc.verification.oracle import Case, expect

NOTHING = types.SimpleNamespace(steps=(), positions="keep", attention=None, cache=None, reselect=None)


@pytest.mark.parametrize("family", ("paligemma2", "gemma3", "qwen2_vl"))
def test_generated_tokens_see_what_they_see_in_decode_steps(family: str) -> None:
    """Longer than a window: the prefix is seen whole by itself, and only its end by what is generated."""
    model = support.build_model(family)
    inputs = samples.left_padded(support.inputs(family, 2))
    tokens = torch.tensor([[90, 95, 91, 92], [93, 90, 94, 96]])
    prompt = inputs["input_ids"].shape[1]

    def told(row: int, ids: torch.Tensor) -> list[int]:
        """The next token, whatever the model thinks of it."""
        return tokens[row, len(ids) - prompt :][:1].tolist() or [90]

    options = {"do_sample": False, "prefix_allowed_tokens_fn": told, "output_logits": True}
    with torch.no_grad():
        made = model.generate(**inputs, **options, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True)
    steps = torch.stack(made.logits, 1)
    axes = 3 if family == "qwen2_vl" else 0
    case = Case(inputs, tokens, {}, axes, visual_token_ids(model))
    got = expect(model, NOTHING, case, 2e-5).logits
    assert torch.equal(made.sequences[:, -5:-1], tokens)
    torch.testing.assert_close(got, steps, rtol=0, atol=2e-5 * float(steps.abs().max()))
