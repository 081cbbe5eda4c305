"""Prefill and decode of a real model as variants, and the models that are measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys

import pytest
import torch

import tvc
from tvc.policy import load_policy
from tvc.report.phases import in_sequence, phases
from tvc.report.timing import Variant, measure


def _benchmark(name):
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases():
    return _benchmark("cases")


def test_phases_are_the_model_on_the_prompt_and_on_one_token_more(cases):
    case = cases.CASES["small"]
    model, inputs = cases.build_model(case), cases.build_inputs(case)
    made = phases(model, inputs, logits_to_keep=1)
    with torch.no_grad():
        whole = model(**inputs, logits_to_keep=1)
        token = whole.logits[:, -1:].argmax(-1)
        ids = torch.cat((inputs["input_ids"], token), 1)
        longer = model(input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids))
    assert torch.equal(made["prefill"].call(None).logits[:, -1], whole.logits[:, -1])
    for _ in range(2):  # each turn has a cache of its own
        step = made["decode"].call(made["decode"].setup())
        torch.testing.assert_close(step.logits[:, -1], longer.logits[:, -1], rtol=1e-4, atol=1e-5)


def test_the_prompt_is_as_long_as_the_case_says(cases):
    for case in cases.CASES.values():
        case = dataclasses.replace(case, device="cpu", dtype=torch.float32)
        inputs = cases.build_inputs(case)
        assert inputs["input_ids"].shape == (case.batch, case.visual + case.text)
        assert int((inputs["input_ids"] == cases.IMAGE_TOKEN).sum()) == case.batch * case.visual
        load_policy(case.policy)
        load_policy(cases.KEEP_ALL)


def test_the_ideal_has_every_layer_at_its_native_length(cases):
    before, behind = cases.CASES["decoder-12x768"].parts
    assert (before.layers, before.visual, before.text) == (2, 576, 64)
    assert (behind.layers, behind.visual, behind.text) == (10, 64, 64)


def test_variants_in_sequence_are_all_called():
    called = []
    both = in_sequence([Variant(called.append, lambda: 1), Variant(called.append, lambda: 2)])
    measure({"both": both}, repeats=2, warmup=0)
    assert called == [1, 2, 1, 2]


def test_selection_as_published_is_what_is_compiled(cases):
    """The baseline of the GPU's benchmark, on the model's own layers, answers like the policy it is compared with."""
    case = dataclasses.replace(cases.CASES["small"], batch=2)
    model, inputs = cases.build_model(case), cases.build_inputs(case)
    compiled = tvc.compile(model, case.policy, inputs=inputs, verify=False)
    published = _benchmark("published").Published(model, case, inputs)
    with torch.no_grad():
        torch.testing.assert_close(published.prefill(), compiled(**inputs).logits, rtol=1e-4, atol=1e-5)
