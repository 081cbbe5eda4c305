"""Compiled models on a CUDA device: equal to the untouched model there, in every type, without waiting for the device.

The lane needs a GPU (`pytest -m gpu`); what is fused for CUDA is tested without one in `test_fusion.py`.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tvc
from support import build, inputs
from tvc.policy import load_policy

pytestmark = pytest.mark.gpu

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
POLICIES = {
    "fastv": [],
    "visionzip": ["keep=25%", "contextual=2"],
    "sparsevlm": ["first=1", "second=2", "third=4"],
    "divprune": [],
    "tome": [],
}
TOWERS = ("visionzip", "tome")  # cut inside the vision encoder, or read its class token


def _compiled(family: str, preset: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = build(family)[0].to("cuda", dtype)
    policy = load_policy(preset, POLICIES[preset])
    return model, tvc.compile(model, policy, inputs=_on_device(inputs(family, 2)))


def _on_device(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to("cuda") for name, value in given.items()}


@pytest.mark.parametrize(
    ("family", "preset"),
    [(f, p) for f in FAMILIES for p in POLICIES if p not in TOWERS or f == "llava"],
)
def test_a_compiled_model_equals_the_untouched_one(family: str, preset: str) -> None:
    model, compiled = _compiled(family, preset)
    for batch in (1, 3):
        report = tvc.verify(compiled, model, _on_device(inputs(family, batch)))
        assert report.passed, report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["fastv", "divprune", "sparsevlm"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_compiled_model_equals_the_untouched_one_in_half_precision(
    family: str, preset: str, dtype: torch.dtype
) -> None:
    model, compiled = _compiled(family, preset, dtype)
    for batch in (1, 3):
        report = tvc.verify(compiled, model, _on_device(inputs(family, batch)))
        assert report.passed, report


def test_the_answers_are_those_of_the_processor() -> None:
    model = build("llava")[0]
    given = inputs("llava", 3)
    wanted = tvc.compile(model, "fastv", inputs=given).generate(**given, max_new_tokens=12, do_sample=False)
    model = model.to("cuda")
    compiled = tvc.compile(model, "fastv", inputs=_on_device(given))
    got = compiled.generate(**_on_device(given), max_new_tokens=12, do_sample=False)
    assert got.tolist() == wanted.tolist()


class _Recorded:
    def __init__(self, run: Any):
        self.run, self.given = run, []

    def __call__(self, component: str, given: Any) -> Any:
        self.given.append((component, dict(given)))
        return self.run(component, given)


@pytest.mark.parametrize("preset", ["fastv", "sparsevlm", "divprune", "tome"])
def test_no_graph_with_a_fixed_budget_waits_for_the_device(preset: str) -> None:
    _, compiled = _compiled("llava", preset, torch.bfloat16)
    recorded = compiled.engine.run = _Recorded(compiled.engine.run)
    compiled(**_on_device(inputs("llava", 2)))
    outputs = [recorded.run(component, given) for component, given in recorded.given]  # warm
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [recorded.run(component, given) for component, given in recorded.given]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(outputs, again, strict=True):
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_attention_over_runs_equals_attention_under_the_mask() -> None:
    torch.manual_seed(0)
    for batch, heads, groups, length, width in ((1, 8, 8, 300, 64), (3, 8, 2, 129, 128), (2, 7, 1, 65, 80)):
        query = torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.randn(batch, groups, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        places = torch.arange(length, device="cuda").repeat(batch, 1) * 2
        for sample in range(1, batch):
            places[sample, : 20 * sample] = -1
        runs = torch.ops.tvc.attention_runs(places)
        got = torch.ops.tvc.attend(query, key, value, places, places, runs, width**-0.5)
        mask = torch.ops.tvc.attention_mask(places, places, 0)
        want = torch.ops.tvc.attention(query.double(), key.double(), value.double(), mask, width**-0.5, 0.0)
        real = (places >= 0)[:, None, :, None]
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got.double() * real, want * real, rtol=3.2e-2, atol=3.2e-2)


def test_memory_is_linear_in_tokens() -> None:
    """No tensor of queries x keys: what the mask of 8,192 tokens alone would take is more than the whole call takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, compiled = _compiled("llava", "fastv", torch.bfloat16)
    recorded = compiled.engine.run = _Recorded(compiled.engine.run)
    compiled(**_on_device(inputs("llava", 1)))
    given = next(dict(given) for component, given in recorded.given if component == "decoder")
    peaks = []
    for length in (8192, 16384):
        slots = torch.arange(length, device="cuda")[None]
        width = given["inputs_embeds"].shape[2]
        chunk = {
            "inputs_embeds": torch.randn(1, length, width, device="cuda", dtype=torch.bfloat16),
            "position_ids": slots,
            "query_positions": slots,
            "text_index": slots[:, :64],
            "visual_index": slots[:, 64:].contiguous(),
            "visual_segment": torch.zeros(1, length - 64, dtype=torch.int64, device="cuda"),
            "visual_counts": torch.tensor([[length - 64]], device="cuda"),
        }
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        recorded.run("decoder", {**given, **chunk})
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0], peaks
    assert peaks[1] < 16384**2
