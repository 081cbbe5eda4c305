"""The oracle's single call over prompt and answer, beside the untouched model that writes one token after another."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import support
from tvc.api import layout_of
from tvc.kernels.op import Scope
from tvc.policy import load_policy, resolve
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


def test_a_merge_behind_the_projector_has_not_seen_positions() -> None:
    """By hand on what the decoder is given; OPT adds its positions to that in front of its first block."""
    model, inputs = support.build_model("blip-2"), samples.left_padded(support.inputs("blip-2", 2))
    step = {"at": "projector", "merge": {"bipartite": {"keep": "40%"}}}
    policy = resolve(load_policy({"version": 1, "name": "mine", "steps": [step]}), layout_of(model, inputs=inputs))
    tokens = visual_token_ids(model)
    case = Case(inputs, inputs["input_ids"][:, :0], {}, 0, tokens)
    got = expect(model, policy, case, 2e-5).logits

    def merged(_decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        embeds, mask = kwargs["inputs_embeds"].clone(), kwargs["attention_mask"].clone()
        for row, ids in enumerate(inputs["input_ids"]):
            slots = torch.isin(ids, torch.tensor(tokens)).nonzero().flatten()
            images = torch.zeros(1, len(slots), dtype=torch.int64)
            scope = Scope(images, torch.tensor([[len(slots)]]), 1)
            index, feature, _ = policy.steps[0].merge.apply(embeds[row, slots][None], torch.ones(1, len(slots)), scope)
            mask[row, slots] = 0
            mask[row, slots[index[0]]] = 1
            embeds[row, slots[index[0]]] = feature[0]
        return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": mask}

    handle = model.get_decoder().register_forward_pre_hook(merged, with_kwargs=True)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(**inputs, position_ids=places).logits[:, -1:]
    handle.remove()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
