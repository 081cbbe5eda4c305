"""Tokens that leave the caches of earlier layers: against the untouched model with masks that are written out here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared
from tvc.passes.retrace import Retrace
from tvc.report.cost import one_image
from tvc.report.schedule import make_plan
from tvc.trace.load import load
from tvc.trace.survey import survey
from tvc.verification.check import compare

Inputs = dict[str, torch.Tensor]
SCORE = {"attention": {"of": "last", "layer": "previous"}}


def step(layer: int, keep: str, **more: str) -> dict[str, Any]:
    return {"at": f"language.{layer}", "score": SCORE, "select": {"top": {"keep": keep}}, **more}


# Three stages by two cuts, and a fourth as caches are cut from layer 1 on.
POLICY = {"version": 1, "steps": [step(2, "50%", evict="language.1"), step(4, "50%", evict="language.1")]}
CUTS, FIRST = (2, 4), 1


class Made:
    def __init__(self) -> None:
        self.model, self.processor = support.build("llava")
        self.prepared = Prepared(self.model, processor=self.processor)
        self.compiled = self.prepared.compile(POLICY, verify=False)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


def untouched(model: Any, inputs: Inputs, parts: Sequence[tuple[int, dict[str, torch.Tensor]]]) -> torch.Tensor:
    """[B, S, vocabulary] of the untouched model.

    `parts`: what came in one call each, as (columns, `kept` of the compiled model). From a cut on nobody sees what it
    dropped; in layers in front of it, from FIRST on, the part that dropped it does, and no later one.
    """
    valid = inputs["attention_mask"].bool()
    batch, size = valid.shape
    columns = torch.arange(size)
    seen = (columns <= columns[:, None])[None] & valid[:, None, :]
    seen |= torch.eye(size, dtype=torch.bool)  # pads see themselves, so that their numbers stay finite
    masks = [seen.clone() for _ in model.get_decoder().layers]
    start = 0
    for length, kept in parts:
        inside, later = (columns >= start) & (columns < start + length), (columns >= start + length)[:, None]
        before = inside.expand(batch, -1)
        for cut in CUTS:
            rows = kept[f"language.{cut}"]
            stays = torch.zeros(batch, size + 1, dtype=torch.bool).scatter(1, torch.where(rows < 0, size, rows), True)
            dropped = (before & valid & ~stays[:, :-1])[:, None, :]
            for layer, mask in enumerate(masks):
                gone = dropped if layer >= cut else dropped & later & (layer >= FIRST)
                mask &= ~gone | torch.eye(size, dtype=torch.bool)
            before = before & stays[:, :-1]
        start += length
    with torch.no_grad(), support.masked(model, masks):
        return model(**inputs).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_caches_hold_what_the_plan_says_and_steps_run_without_the_cuts(made: Made) -> None:
    inputs = support.inputs("llava")
    text = int((~support.visual_mask("llava", inputs["input_ids"])).sum())
    layout = survey(load(made.model, processor=made.processor).meta, made.processor).layout
    plan = make_plan(tvc.policy.resolve(tvc.load_policy(POLICY), layout), one_image(layout), text_tokens=text)
    cache = made.compiled(**inputs).past_key_values
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [text + 16] + [text + 4] * 5
    assert held == [layer.held for layer in plan.layers]
    assert [layer.tokens for layer in plan.layers] == [text + 16] * 2 + [text + 8] * 2 + [text + 4] * 2
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert size == plan.compiled.kv_bytes
    assert [(stage.first, stage.last, stage.held) for stage in plan.stages if stage.part == "language"] == [
        (0, 0, text + 16),
        (1, 1, text + 4),
        (2, 3, text + 4),
        (4, 5, text + 4),
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_padded_batch_equals_the_untouched_model(made: Made, batch: int) -> None:
    rows = compare(made.compiled, made.model, support.inputs("llava", batch), steps=3).comparisons
    assert {row.output for row in rows} >= {"kept", "selection", "logits.2"}
    assert not [row for row in rows if not row.passed]


@pytest.mark.conformance
def test_verification_sees_caches_that_were_not_cut(made: Made) -> None:
    plain = made.prepared.compile({"version": 1, "steps": [step(2, "50%"), step(4, "50%")]}, verify=False)
    plain.policy = made.compiled.policy
    wrong = {
        row.output for row in compare(plain, made.model, support.inputs("llava"), steps=3).comparisons if not row.passed
    }
    assert {"cache.1", "logits.1", "logits.2"} <= wrong
    assert "logits.0" not in wrong  # the prompt itself is read with everything there


def test_a_later_turn_sees_what_is_left(made: Made) -> None:
    """A padded batch, then text, then a single token."""
    inputs = support.inputs("llava", 3)
    prompt, more = inputs["input_ids"].shape[1], torch.arange(40, 46).expand(3, -1)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    got, parts, cache = support.conversation(made.compiled, whole, (prompt, 5, 1), {0: inputs["pixel_values"]})
    want = untouched(made.model, whole, parts[:1])
    close(got, want[:, [prompt - 1, -2, -1]])
    first = made.compiled(**inputs).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [layer.keys.shape[2] + 6 for layer in first.layers]


def test_a_second_image_takes_only_its_own_tokens_along(made: Made) -> None:
    both, cut = support.two_images()
    lengths, pixels = (cut, both["input_ids"].shape[1] - cut), both["pixel_values"]
    got, parts, _ = support.conversation(made.compiled, both, lengths, {0: pixels[:1], 1: pixels[1:]})
    want = untouched(made.model, both, parts)
    # The first part ends in a visual token, which may have been dropped: it answers nothing.
    close(got[:, 1], want[:, -1])


def test_beams_are_worth_what_the_untouched_model_gives_them(made: Made) -> None:
    inputs = support.inputs("llava", 2)
    scores, whole = support.beams(made.compiled, inputs, 4)
    want = untouched(made.model, whole, [(inputs["input_ids"].shape[1], made.compiled(**inputs).kept)])
    close(scores, support.worth(want, whole["input_ids"], 4))


@pytest.mark.conformance
def test_a_policy_that_evicts_nothing_has_the_graph_it_had(made: Made) -> None:
    """Names of nodes apart, the two differ by what is evicted alone."""

    def targets(policy: dict[str, Any]) -> list[str]:
        program = Retrace()(made.prepared.reduce(tvc.load_policy(policy))[0])
        return [str(node.target) for node in program.components["decoder"].exported.graph.nodes]

    plain = {"version": 1, "steps": [step(2, "50%")]}
    evicting = {"version": 1, "steps": [step(2, "50%", evict="earlier")]}
    one, other = targets(plain), targets(evicting)
    assert "tvc.evict.default" not in one
    assert other.count("tvc.evict.default") == 2 * 2 + 1  # keys and values of two layers, and their places
    assert tvc.load_policy(plain).digest() != tvc.load_policy(evicting).digest()


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["ort", "pt2", "torchscript"])
def test_targets_evict_alike(made: Made, target: str) -> None:
    compiled = made.prepared.compile(POLICY, target, verify=False)
    for batch in (1, 3):
        inputs = support.inputs("llava", batch)
        assert not [row for row in compare(compiled, made.model, inputs, steps=3).comparisons if not row.passed]


@pytest.mark.conformance
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "lfm2_vl", "paligemma"])
def test_families_with_axes_windows_states_and_spans(family: str) -> None:
    model, processor = support.build(family)
    sample = None if processor is not None else support.inputs(family, 2)
    steps = [step(1, "50%", evict="earlier"), {**step(2, "50%"), "exit": {"when": "always"}, "evict": "earlier"}]
    steps[0]["score"] = "norm"  # the layer before may be one without attention
    for name in ("score", "select"):
        steps[1].pop(name)
    compiled = tvc.compile(model, {"version": 1, "steps": steps}, processor=processor, inputs=sample, verify=False)
    for batch in (1, 3):
        inputs = support.inputs(family, batch)
        assert not [row for row in compare(compiled, model, inputs, steps=3).comparisons if not row.passed]
