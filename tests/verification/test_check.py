"""Compiled models beside the untouched ones; and compiled models that somebody spoiled, which must not pass."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from typer.testing import CliRunner

import support
import tvc
from tvc.cli import build_app
from tvc.commands.compile import worst
from tvc.verification import samples
from tvc.verification.check import compare
from tvc.verification.report import TOLERANCES, Comparison, Report

AT_TWO = ("at=language.2", "keep=50%")
# Everything that a step can do: even spacing, merging, a count settled at run time, both kinds of exit, new positions
# (which the layer at a later cut has already, when it is asked for its attention).
MIXED = """
version: 1
name: mixed
positions: renumber
steps:
  - at: language.1
    select: {stride: {keep: 50%}}
    rest: {merge: {targets: {stride: 3}, by: key_cosine, reduce: size_weighted}}
  - at: language.3
    score: {attention: {of: text, layer: self}}
    select: {threshold: {relative: 0.6}}
    rest: drop
  - at: language.4
    exit: {when: {score: {cosine: {to: text}}, reduce: mean, above: 0.3}}
  - at: language.5
    exit: {when: always}
"""
# What steps ask of the layer that runs next: attention, keys, and queries that no position has turned.
NEXT_LAYER = """
version: 1
name: next-layer
positions: renumber
steps:
  - at: language.1
    select: {stride: {keep: 70%}}
  - at: language.3
    score: mean_query
    select: {density: {keep: 70%, cutoff: 0.3}}
    rest: {merge: {by: key_cosine, layer: self, heads: joined, within: 0.5}}
  - at: language.5
    score: {peak: {of: last, layer: self}}
    select: {top: 50%}
"""
PASSING = (
    ("llava", "fastv", ()),
    ("llava", MIXED, ()),
    pytest.param("qwen2_5_vl", "pyramiddrop", (), marks=pytest.mark.conformance),
    pytest.param("qwen2_5_vl", "random", AT_TWO, marks=pytest.mark.conformance),
)


@pytest.fixture(scope="module")
def fastv(artifacts):
    return artifacts("llava", "fastv")


@contextlib.contextmanager
def spoiled(compiled, change):
    """`change(component, inputs, outputs)` gets between the graphs and the runtime."""
    run = compiled.engine.run

    def spoil(component, inputs):
        return change(component, inputs, run(component, inputs))

    compiled.engine.run = spoil
    try:
        yield compiled
    finally:
        compiled.engine.run = run


def prefill(inputs):
    return inputs["past_key_positions.0"].shape[1] == 0


@pytest.mark.parametrize(("family", "policy", "settings"), PASSING, ids=["fastv", "mixed", "pyramiddrop", "random"])
def test_dropping_equals_masking(artifacts, family, policy, settings):
    made = artifacts(family, policy, settings=settings)
    report = compare(made.compiled, made.model, support.inputs(family, 2, seed=1))
    assert report.passed, report.text()
    names = {row.name for row in report.comparisons}
    assert names == {"batch 2", "batch 1", "padded batch 3"}
    outputs = [row.output for row in report.comparisons if row.name == "batch 2"]
    assert outputs.count("selection") == len(made.compiled.policy.steps)
    assert [o for o in outputs if o.startswith("logits")] == [f"logits.{step}" for step in range(8)]
    # A difference of exactly nothing would mean that the same numbers were compared with themselves.
    assert 0 < report.worst.worst < report.worst.allowed


def test_a_batch_whose_first_sample_has_no_image(fastv):
    given = support.inputs("llava", 2)
    visual = support.visual_mask("llava", given["input_ids"])[0]
    given["attention_mask"][0][: int(visual.nonzero()[-1]) + 1] = 0  # what is left of it is text behind the image
    given["input_ids"][0][visual] = 0
    given["pixel_values"] = given["pixel_values"][1:]
    report = compare(fastv.compiled, fastv.model, given, steps=2)
    assert report.passed, report.text()
    assert {row.name for row in report.comparisons} == {"batch 2", "batch 1", "padded batch 3"}


@pytest.mark.conformance
def test_near_ties_may_be_settled_another_way_in_a_batch():
    """Two visual tokens are alike, and one stays; samples by themselves see the first a few roundings smaller."""
    model, (first, second) = support.build_model("llava"), (5, 9)

    def alike(_module, _args, features):
        rows = list(features.split(1, 1))
        rows[first] = rows[second] = 4 * rows[first]
        return torch.cat(rows, 1)

    model.model.multi_modal_projector.register_forward_hook(alike)
    step = {"at": "language.0", "score": "norm", "select": {"top": {"keep": 1}}, "rest": "drop"}
    given = support.inputs("llava", 1)
    made = tvc.compile(model, {"version": 1, "name": "one", "steps": [step]}, inputs=given, verify=False)
    run = made.engine.run

    def smaller(component, inputs):
        if component == "decoder" and prefill(inputs) and len(inputs["inputs_embeds"]) == 1:
            scale = torch.ones(inputs["inputs_embeds"].shape[1], 1)
            scale[inputs["visual_index"][0, first]] -= 1e-6
            inputs = {**inputs, "inputs_embeds": inputs["inputs_embeds"] * scale}
        return run(component, inputs)

    made.engine.run = smaller
    report = compare(made, model, given, steps=2)
    assert report.passed, report.text()
    assert "sample 0 of padded batch 3" in {row.name for row in report.comparisons}


def test_without_inputs_a_picture_is_made(fastv):
    report = tvc.verify(fastv.compiled, fastv.model, steps=2)
    assert report.passed
    assert {row.name for row in report.comparisons} == {"batch 1", "padded batch 3"}


def shift_kept(component, inputs, outputs):
    """Later layers hold the token before the one that was chosen."""
    if component == "decoder" and prefill(inputs):
        places = outputs["key_positions.1"]
        outputs["key_positions.1"] = torch.where(places > 2, places - 1, places)
    return outputs


def lose_a_position(component, inputs, outputs):
    """From the first decode step on, every cached token of the first stage is one place later."""
    if component == "decoder" and not prefill(inputs):
        places = outputs["key_positions.0"]
        outputs["key_positions.0"] = torch.where(places >= 0, places + 1, places)
    return outputs


def stale_key(component, inputs, outputs):
    if component == "decoder":
        outputs["key.3"] = outputs["key.3"] + 1e-3
    return outputs


def noisy_logits(component, inputs, outputs):
    if component == "decoder" and not prefill(inputs):
        outputs["logits"] = outputs["logits"] + torch.linspace(0, 1e-2, outputs["logits"].shape[-1])
    return outputs


@pytest.mark.parametrize(
    ("change", "site", "output"),
    [
        (shift_kept, "language.2", "selection"),
        (lose_a_position, "start", "cache.0"),
        (stale_key, "language.2", "key.3"),
        (noisy_logits, "language.2", "logits.1"),
    ],
)
def test_a_spoiled_model_is_named_by_site_and_output(fastv, change, site, output):
    with spoiled(fastv.compiled, change) as compiled, pytest.raises(tvc.VerificationError) as caught:
        tvc.verify(compiled, fastv.model, support.inputs("llava", 1), steps=3)
    error = caught.value
    assert error.exit_code == 3
    assert f"site {site}, {output}" in error.where
    first = error.report.first_failure()
    assert (first.site, first.output) == (site, output)
    assert first.worst > first.allowed
    assert not error.report.passed


def test_a_sample_that_sees_its_neighbours_is_found(fastv):
    """Right for each sample alone, wrong in a batch."""

    def leak(component, inputs, outputs):
        if component == "decoder" and len(outputs["logits"]) > 1:
            outputs["logits"] = outputs["logits"] + 0.1 * outputs["logits"].roll(1, 0)
        return outputs

    with spoiled(fastv.compiled, leak) as compiled:
        report = compare(compiled, fastv.model, support.inputs("llava", 1), steps=2)
    failed = {(row.name, row.output) for row in report.comparisons if not row.passed}
    assert ("padded batch 3", "batch of 3 = 3 of 1") in failed
    assert all(name == "padded batch 3" for name, _ in failed)


def test_the_untouched_model_stays_untouched(fastv):
    inputs = support.inputs("llava", 1)
    before = {name: value.clone() for name, value in fastv.model.state_dict().items()}
    with torch.no_grad():
        want = fastv.model(**inputs).logits
    compare(fastv.compiled, fastv.model, inputs, steps=2)
    with torch.no_grad():
        assert torch.equal(fastv.model(**inputs).logits, want)
    assert all(torch.equal(before[name], value) for name, value in fastv.model.state_dict().items())
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in fastv.model.model.language_model.layers
    )
    assert fastv.model.config.text_config._attn_implementation == "sdpa"


def test_the_command_exits_with_three(fastv, tmp_path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    support.save_model("llava", right)
    support.save_model("llava", wrong, seed=1)
    support.photo(0, (64, 64)).save(tmp_path / "photo.png")
    run = CliRunner()
    common = ["verify", str(fastv.folder), "--steps", "2", "--json", "--image", str(tmp_path / "photo.png")]
    done = run.invoke(build_app(), [*common, "--model", str(right)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["passed"] is True
    done = run.invoke(build_app(), [*common, "--model", str(wrong)])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["passed"] is False
    assert "error[TVC510]" in done.stderr


# Reports -------------------------------------------------------------------------------------------------------------


def row(output, worst, allowed):
    return Comparison("batch 1", "language.2", output, worst, allowed)


def test_a_report_knows_its_worst_and_its_first_failure():
    report = Report((row("key.3", 1e-6, 1e-5), row("logits.0", 3.0, 1.0), row("kept", 1.0, 0.0)))
    assert report.first_failure().output == "logits.0"
    assert report.worst.output == "kept"  # nothing at all was allowed there
    made = report.to_json()
    assert made["passed"] is False
    assert len({tuple(entry) for entry in made["comparisons"]}) == 1
    assert "DIFFERS" in report.text()


def test_a_report_says_what_was_not_compared(fastv, monkeypatch):
    inputs = support.inputs("llava", 2)
    whole = compare(fastv.compiled, fastv.model, inputs, steps=1)
    assert whole.left_out == ()
    monkeypatch.setattr(samples, "singles", lambda *_: None)  # as of inputs of which no sample's share is known
    report = compare(fastv.compiled, fastv.model, inputs, steps=1)
    assert {row.name for row in whole.comparisons} > {row.name for row in report.comparisons} == {"batch 2"}
    (what,) = report.left_out
    assert "padded batch" in what
    assert report.text().splitlines()[-1] == f"not compared: {what}"
    assert worst(report.to_json()).splitlines()[1:] == [f"not compared: {what}"]


def test_what_is_not_a_number_never_passes():
    failing = row("logits.0", float("nan"), 1.0)
    assert not failing.passed
    assert json.loads(json.dumps(failing.to_json(), allow_nan=False))["worst"] == "nan"
    assert Report((row("key.0", 0.9, 1.0), failing)).worst is failing


def test_tolerance_grows_with_the_numbers_but_not_below_one():
    strict = TOLERANCES[torch.float32]
    assert strict.allowed(torch.tensor([0.1])) == strict.allowed(torch.tensor([1.0])) == 2e-5
    assert strict.allowed(torch.tensor([-10.0])) == pytest.approx(2e-4)
    assert strict.allowed_score(torch.tensor([0.01])) == pytest.approx(2e-7)


@pytest.mark.conformance
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_the_next_layer_is_asked_on_the_positions_that_it_will_see(positions):
    model = support.build_model("llava")
    policy = tvc.load_policy(NEXT_LAYER, set={"positions": positions})
    compiled = tvc.compile(model, policy, inputs=support.inputs("llava", 2), verify=False)
    for batch in (1, 3):
        assert compare(compiled, model, support.inputs("llava", batch), steps=3).passed


@pytest.mark.conformance
def test_a_component_takes_each_token_that_enters_for_one():
    """What was folded in front of the decoder is one token to a merge by sizes inside it."""
    fold = {"at": "projector", "score": "norm", "select": {"top": {"keep": "60%"}}, "rest": "fold"}
    merge = {"at": "language.2", "merge": {"bipartite": {"remove": 3, "reduce": "size_weighted"}}}
    model = support.build_model("llava")
    policy = {"version": 1, "name": "twice", "steps": [fold, merge]}
    compiled = tvc.compile(model, policy, inputs=support.inputs("llava", 2), verify=False)
    report = compare(compiled, model, support.inputs("llava", 2), steps=2)
    assert report.passed, report.text()


def test_samples_whose_patches_stand_in_one_strip_are_joined_along_it():
    """The untouched model says the same of both samples, padded, as of each by itself."""
    model = support.build_model("minicpmv4_7")
    apart = [support.inputs("minicpmv4_7", seed=seed) for seed in (1, 2)]
    assert apart[0]["pixel_values"].shape != apart[1]["pixel_values"].shape
    together = samples.joined(model, apart, pad=0)
    assert together is not None
    assert together["pixel_values"].shape[-1] == sum(one["pixel_values"].shape[-1] for one in apart)
    with torch.no_grad():
        got = model(**together).logits[:, -1]
        want = torch.cat([model(**one).logits[:, -1] for one in apart])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
