"""Rotary embeddings at rescaled frequencies, against the untouched model built anew with transformers' own YaRN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import support
import tvc
from tvc.errors import SiteError
from tvc.verification.check import compare

SETTINGS = {"factor": 4.0, "window": 64}  # few turns: some of the tiny model's frequencies are divided, others stay
POLICY = {"version": 1, "positions": {"rescale": SETTINGS}}
CUT = {"at": "language.2", "score": "norm", "select": {"top": "50%"}}


def with_yarn(family: str, model: Any) -> Any:
    """The same weights under a configuration that asks for YaRN."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.rope_parameters = {
        **text.rope_parameters,
        "rope_type": "yarn",
        "factor": SETTINGS["factor"],
        "original_max_position_embeddings": SETTINGS["window"],
    }
    made = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.conformance)])
def test_prompts_and_later_turns_equal_the_model_configured_so(family: str) -> None:
    model, processor = support.build(family)
    compiled = tvc.compile(model, POLICY, processor=processor, verify=False)
    inputs = support.inputs(family, 2)
    other = with_yarn(family, model)
    ids = compiled.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(other.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False), ids)
    with torch.no_grad():
        want, untouched = other(**inputs).logits[:, -1], model(**inputs).logits[:, -1]
    near = {"atol": 2e-5 * float(want.abs().max()), "rtol": 0.0}
    torch.testing.assert_close(compiled(**inputs).logits[:, 0], want, **near)
    assert (want - untouched).abs().max() > 0.01  # the frequencies make a difference
    was, now = (one.get_decoder().rotary_emb.inv_freq for one in (support.build_model(family), model))
    assert torch.equal(now, was)  # and it stays as it was


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["torch", "ort", "pt2", "torchscript"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_verification_counts_the_frequencies_by_hand(family: str, target: str) -> None:
    model, processor = support.build(family)
    policy = {**POLICY, "steps": [CUT]}
    compiled = tvc.compile(model, policy, target, processor=processor, verify=False)
    for batch in (1, 3):
        given = support.inputs(family, batch)
        assert not [row for row in compare(compiled, model, given, steps=3).comparisons if not row.passed]


@pytest.mark.conformance
def test_verification_sees_other_frequencies() -> None:
    model, processor = support.build("llava")
    policies = [{**POLICY, "steps": [CUT]}, {**POLICY, "positions": {"rescale": {"factor": 2}}, "steps": [CUT]}]
    one, two = (tvc.compile(model, policy, processor=processor, verify=False) for policy in policies)
    one.policy = two.policy
    assert not all(row.passed for row in compare(one, model, support.inputs("llava"), steps=2).comparisons)


@pytest.mark.parametrize(("family", "reason"), [("gemma3", "one list of frequencies"), ("blip-2", "no rotary")])
def test_decoders_that_keep_their_frequencies_are_refused(family: str, reason: str) -> None:
    model, processor = support.build(family)
    sample = None if processor is not None else support.inputs(family, 2)
    with pytest.raises(SiteError, match=reason):
        tvc.compile(model, POLICY, processor=processor, inputs=sample, verify=False)


def test_a_model_that_is_rescaled_already_is_refused() -> None:
    model, processor = support.build("llava")
    with pytest.raises(SiteError, match="already"):
        tvc.compile(with_yarn("llava", model), POLICY, processor=processor, verify=False)
