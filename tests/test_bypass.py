"""Tokens that pass by some layers: against the untouched model with masks and hooks that are written out here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared
from tvc.graphs import open_draft
from tvc.passes.retrace import Retrace
from tvc.passes.text_only import without_cuts
from tvc.report.cost import one_image
from tvc.report.schedule import make_plan
from tvc.trace.load import load
from tvc.trace.survey import survey
from tvc.verification.check import compare

Inputs = dict[str, torch.Tensor]
OWN = {"score": {"attention": {"of": "last", "layer": "self"}}, "select": {"top": {"keep": "40%"}}}
EVEN = {"select": {"stride": {"keep": "60%"}}}


def step(layer: int | str, reduction: dict[str, Any], **more: str) -> dict[str, Any]:
    return {"at": f"language.{layer}", **reduction, **more}


# Where no stage has run before, over two layers, and tokens that come back in front of a cut for good.
STEPS = [step(0, EVEN, until="next"), step(2, OWN, until="language.4"), step(5, OWN)]
POLICY = {"version": 1, "steps": STEPS}
ENDS = {0: 1, 2: 4, 5: None}  # of each step
# Layers passed by one at a time, each with a choice of its own, and each the home of the next.
EACH = {"version": 1, "steps": [step("1..-2", OWN, until="next")]}


class Made:
    def __init__(self) -> None:
        self.model, self.processor = support.build("llava")
        self.prepared = Prepared(self.model, processor=self.processor)
        self.compiled = self.prepared.compile(POLICY, verify=False)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@contextlib.contextmanager
def passing(model: Any, dropped: dict[int, torch.Tensor]) -> Iterator[None]:
    """What was `dropped` [B, S] in front of a layer is put back as it was, where its step ends."""
    blocks, entered = model.get_decoder().layers, dict[int, torch.Tensor]()

    def note(layer: int) -> Callable[..., None]:
        def hook(_block: Any, args: tuple[Any, ...]) -> None:
            entered[layer] = args[0]

        return hook

    def put_back(layer: int) -> Callable[..., tuple[Any, ...]]:
        def hook(_block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return torch.where(dropped[layer][:, :, None], entered[layer], args[0]), *args[1:]

        return hook

    with contextlib.ExitStack() as stack:
        for layer, end in ENDS.items():
            stack.callback(blocks[layer].register_forward_pre_hook(note(layer)).remove)
            if end is not None:
                stack.callback(blocks[end].register_forward_pre_hook(put_back(layer)).remove)
        yield


def untouched(model: Any, inputs: Inputs, parts: Sequence[tuple[int, dict[str, torch.Tensor]]]) -> torch.Tensor:
    """[B, S, vocabulary] of the untouched model.

    `parts`: what came in one call each, as (columns, `kept` of the compiled model). From a step to its end nobody sees
    what it dropped.
    """
    valid = inputs["attention_mask"].bool()
    batch, size = valid.shape
    columns = torch.arange(size)
    seen = (columns <= columns[:, None])[None] & valid[:, None, :]
    own = torch.eye(size, dtype=torch.bool)  # everybody sees itself, so that all numbers stay finite
    masks = [seen.clone() for _ in model.get_decoder().layers]
    dropped = {layer: torch.zeros_like(valid) for layer in ENDS}
    start = 0
    for length, kept in parts:
        inside = (columns >= start) & (columns < start + length)
        for layer, gone in dropped.items():
            rows = kept[f"language.{layer}"]
            stays = torch.zeros(batch, size + 1, dtype=torch.bool).scatter(1, torch.where(rows < 0, size, rows), True)
            gone |= inside & valid & ~stays[:, :-1]
        start += length
    for layer, end in ENDS.items():
        for mask in masks[layer:end]:
            mask &= ~dropped[layer][:, None, :]
    with torch.no_grad(), support.masked(model, [mask | own for mask in masks]), passing(model, dropped):
        return model(**inputs).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_layers_passed_by_hold_the_chosen_tokens_and_later_ones_all(made: Made) -> None:
    inputs = support.inputs("llava")
    text = int((~support.visual_mask("llava", inputs["input_ids"])).sum())
    layout = survey(load(made.model, processor=made.processor).meta, made.processor).layout
    plan = make_plan(tvc.policy.resolve(tvc.load_policy(POLICY), layout), one_image(layout), text_tokens=text)
    answer = made.compiled(**inputs)
    held = [layer.keys.shape[2] for layer in answer.past_key_values.layers]
    assert held == [text + left for left in (9, 16, 6, 6, 16, 6)]
    assert held == [layer.held for layer in plan.layers] == [layer.tokens for layer in plan.layers]
    assert {site: rows.shape[1] - text for site, rows in answer.kept.items()} == {
        "language.0": 9,
        "language.2": 6,
        "language.5": 6,
    }
    size = sum(
        t.numel() * t.element_size() for layer in answer.past_key_values.layers for t in (layer.keys, layer.values)
    )
    assert size == plan.compiled.kv_bytes
    runs = [(stage.first, stage.last, stage.visual, stage.sites) for stage in plan.stages if stage.part == "language"]
    assert runs == [
        (0, 0, 9, ("language.0",)),
        (1, 1, 16, ()),
        (2, 3, 6, ("language.2",)),
        (4, 4, 16, ()),
        (5, 5, 6, ("language.5",)),
    ]


def test_a_later_turn_of_a_padded_batch_equals_the_untouched_model(made: Made) -> None:
    """Prompts of three lengths, then text, then a single token."""
    inputs = support.inputs("llava", 3)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 3
    prompt, more = inputs["input_ids"].shape[1], torch.arange(40, 46).expand(3, -1)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    got, parts, _ = support.conversation(made.compiled, whole, (prompt, 5, 1), {0: inputs["pixel_values"]})
    want = untouched(made.model, whole, parts[:1])
    close(got, want[:, [prompt - 1, -2, -1]])


def test_a_second_image_passes_by_for_itself(made: Made) -> None:
    both, cut = support.two_images()
    lengths, pixels = (cut, both["input_ids"].shape[1] - cut), both["pixel_values"]
    got, parts, _ = support.conversation(made.compiled, both, lengths, {0: pixels[:1], 1: pixels[1:]})
    want = untouched(made.model, both, parts)
    # The first part ends in a visual token, which may have been dropped: it answers nothing.
    close(got[:, 1], want[:, -1])


def test_verification_puts_back_what_passed_by(made: Made) -> None:
    rows = compare(made.compiled, made.model, support.inputs("llava"), steps=2).comparisons
    assert {row.output for row in rows} >= {"kept", "selection", "plan", "logits.1"}
    assert not [row for row in rows if not row.passed]


@pytest.mark.conformance
def test_verification_sees_tokens_that_do_not_come_back(made: Made) -> None:
    steps = [{key: value for key, value in one.items() if key != "until"} for one in STEPS[:2]]
    gone = made.prepared.compile({"version": 1, "steps": steps}, verify=False)
    gone.policy = made.prepared.compile({"version": 1, "steps": STEPS[:2]}, verify=False).policy
    wrong = {
        row.output for row in compare(gone, made.model, support.inputs("llava"), steps=2).comparisons if not row.passed
    }
    assert {"cache.1", "logits.0", "logits.1"} <= wrong


@pytest.mark.conformance
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("more", [{}, {"positions": "renumber"}, {"positions": {"stride": 64}}], ids=str)
@pytest.mark.parametrize("policy", [POLICY, EACH], ids=["some", "each"])
def test_positions_and_batches(made: Made, policy: dict[str, Any], more: dict[str, Any], batch: int) -> None:
    compiled = made.prepared.compile({**policy, **more}, verify=False)
    inputs = support.inputs("llava", batch)
    assert not [row for row in compare(compiled, made.model, inputs, steps=3).comparisons if not row.passed]


@pytest.mark.conformance
def test_padding_on_the_right_and_on_the_left_is_the_same(made: Made) -> None:
    left = support.inputs("llava", 3)
    order = torch.argsort(left["attention_mask"], dim=1, descending=True, stable=True)
    right = {**left, "input_ids": left["input_ids"].gather(1, order)}
    right["attention_mask"] = left["attention_mask"].gather(1, order)
    close(made.compiled(**right).logits, made.compiled(**left).logits)


@pytest.mark.conformance
def test_beams_are_worth_what_the_untouched_model_gives_them(made: Made) -> None:
    inputs = support.inputs("llava", 2)
    scores, whole = support.beams(made.compiled, inputs, 4)
    want = untouched(made.model, whole, [(inputs["input_ids"].shape[1], made.compiled(**inputs).kept)])
    close(scores, support.worth(want, whole["input_ids"], 4))


@pytest.mark.conformance
def test_where_everything_is_chosen_nothing_is_changed(made: Made) -> None:
    whole = {"select": {"stride": {"keep": "100%"}}}
    compiled = made.prepared.compile({"version": 1, "steps": [step(1, whole, until="language.4")]}, verify=False)
    inputs = support.inputs("llava", 3)
    with torch.no_grad():
        close(compiled(**inputs).logits[:, 0], made.model(**inputs).logits[:, -1])


@pytest.mark.conformance
def test_decode_steps_run_without_any_of_it(made: Made) -> None:
    program = Retrace()(made.prepared.reduce(tvc.load_policy(EACH))[0])
    draft = open_draft(program.components["decoder"])
    ours = {"tvc.shorten.default", "tvc.restore.default"}
    assert ours <= {str(node.target) for node in draft.graph.nodes}
    assert not ours & {str(node.target) for node in without_cuts(draft).graph.nodes}
    # The layers around those that are passed by share one stage, the first.
    assert [stage.index for stage in program.stages] == [0, 1, 2, 3, 4, 0]


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["ort", "pt2", "torchscript"])
def test_targets_pass_by_alike(made: Made, target: str) -> None:
    compiled = made.prepared.compile(POLICY, target, verify=False)
    for batch in (1, 3):
        inputs = support.inputs("llava", batch)
        assert not [row for row in compare(compiled, made.model, inputs, steps=3).comparisons if not row.passed]


@pytest.mark.conformance
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "paligemma", "internvl"])
def test_families_with_axes_windows_and_spans(family: str) -> None:
    model, processor = support.build(family)
    sample = None if processor is not None else support.inputs(family, 2)
    steps = [step(1, OWN, until="next"), step(2, OWN, until="language.4"), step(4, OWN)]
    depth = len(model.get_decoder().layers)
    steps = steps if depth > 4 else steps[:1]
    compiled = tvc.compile(model, {"version": 1, "steps": steps}, processor=processor, inputs=sample, verify=False)
    for batch in (1, 3):
        inputs = support.inputs(family, batch)
        assert not [row for row in compare(compiled, model, inputs, steps=3).comparisons if not row.passed]
