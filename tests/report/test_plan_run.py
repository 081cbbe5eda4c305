"""A plan against the run it promises: tokens and cache length of every layer, and FLOPs counted op by op."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import support
from tvc import compiler
from tvc.policy import load_policy, resolve
from tvc.report.cost import attention_flops, one_image, tile_lengths
from tvc.report.schedule import plan_policy
from tvc.runtime.engine import Engine
from tvc.trace.load import load
from tvc.trace.survey import survey

# Without scores, whose few FLOPs a plan leaves out.
POLICY = {
    "version": 1,
    "name": "strides",
    "steps": [
        {"at": "language.1", "select": {"stride": {"keep": "50%"}}, "rest": "drop"},
        {"at": "language.4", "select": {"stride": {"keep": 3}}, "rest": "drop"},
    ],
}


# Products with weights. Attention is one fused op of the graph, which no counter knows; its formula is checked on eager
# layers in test_plan.py.
WEIGHTED = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}
SLOW = (pytest.param(name, marks=pytest.mark.conformance) for name in ("qwen2_5_vl", "llava_onevision", "smolvlm"))


@pytest.mark.parametrize("family", ["llava", *SLOW])
def test_the_run_has_the_tokens_and_the_flops_of_the_plan(family):
    inputs = support.inputs(family)
    source = load(support.build_model(family))
    surveyed = survey(source.meta, None, inputs)
    policy = load_policy(POLICY)
    resolved = resolve(policy, surveyed.layout)
    traced = compiler.trace(source.model, surveyed, resolved, lambda _: None)
    program = compiler.lower(compiler.reduce(traced, resolved, lambda _: None), "torch", lambda _: None)
    runner = compiler.GraphRunner(program)
    flops: dict[str, int] = {}

    def counted(component, given):
        with FlopCounterMode(display=False) as counter:
            out = runner(component, given)
        counts = counter.get_flop_counts().get("Global", {})
        flops[component] = sum(n for op, n in counts.items() if op in WEIGHTED)
        return out

    answer = Engine(surveyed.host, compiler.interface_of(program, resolved, surveyed), counted).call(dict(inputs))
    text = int((~support.visual_mask(family, inputs["input_ids"])).sum())
    plan = plan_policy(policy, one_image(surveyed.layout), text_tokens=text)
    assert [layer.keys.shape[2] for layer in answer.cache.layers] == [layer.tokens for layer in plan.layers]
    assert {site: int((kept >= 0).sum()) for site, kept in answer.kept.items()} == {
        "language.1": plan.layers[1].tokens,
        "language.4": plan.layers[4].tokens,
    }
    cached = sum(t.numel() * t.element_size() for layer in answer.cache.layers for t in (layer.keys, layer.values))
    assert cached == plan.compiled.kv_bytes
    sizes = one_image(surveyed.layout)
    attention = sum(attention_flops(sizes.language[i], n.tokens, n.tokens) for i, n in enumerate(plan.layers))
    assert flops["decoder"] == plan.compiled.prefill - attention
    attention = 0
    for layer in sizes.vision[: sizes.used_vision_blocks]:  # blocks behind the features are not in the graph
        attention += sum(attention_flops(layer, n, min(n, layer.window or n)) for n in tile_lengths(sizes))
    assert flops["vision"] == plan.compiled.vision - attention
