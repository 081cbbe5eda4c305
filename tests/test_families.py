"""Families whose decoders or vision paths differ from LLaVA's: verified, and used with other inputs than they were
traced with.

`PATHS` says what each stands for. A family is traced once; its policies share that trace.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared
from tvc.errors import ExportError, SiteError
from tvc.policy import load_policy, resolve

LAST: dict[str, Any] = {"attention": {"of": "last"}}
TOP: dict[str, Any] = {"top": {"keep": "50%"}}
MERGE = {"merge": {"targets": {"stride": 2}, "by": "feature_cosine", "reduce": "mean"}}


def step(site: str, score: Any = None, select: Any = None, rest: Any = "drop") -> dict[str, Any]:
    return {"at": site, "score": score or LAST, "select": select or TOP, "rest": rest}


def policy(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "mine", "steps": list(steps)}


ONE = policy(step("language.2"))
TWO = policy(
    step("language.0", "norm", {"top": {"keep": "75%"}}, MERGE),
    step("language.3", {"attention": {"of": "text", "layer": "self"}}),
)
BLOCKS = policy(step("language.0", "norm", {"top": {"keep": "75%"}}), step("language.2"))
# The layers in front of language.4 mix tokens by convolutions: its score is of language.1.
CONVOLUTIONS = policy(step("language.0", "norm", {"top": {"keep": "75%"}}), step("language.4"))
RANDOM = policy(step("language.2", "random"))
WHOLE = policy(step("language.2", "random", {"top": {"keep": "100%"}}))

SLOW = pytest.mark.conformance
# Values beside the embeddings; blocks and windows; a prefix; convolutions; vision paths that are not traced; a prefix
# with windows; an encoder that goes image by image; compressed keys and values; experts; patches of all images in one
# strip; layers of unlike configurations, and experts in the encoder.
PATHS = [
    ("qwen3_vl", TWO),
    ("gemma3", BLOCKS),
    ("paligemma", ONE),
    ("lfm2_vl", CONVOLUTIONS),
    pytest.param("idefics2", TWO, marks=SLOW),
    pytest.param("paligemma2", ONE, marks=SLOW),
    pytest.param("mistral3", TWO, marks=SLOW),
    pytest.param("kimi_k25", ONE, marks=SLOW),
    pytest.param("qwen3_vl_moe", TWO, marks=SLOW),
    pytest.param("minicpmv4_7", TWO, marks=SLOW),
    pytest.param("dots3_note", TWO, marks=SLOW),
]


@functools.cache
def model(family: str) -> Any:
    return support.build_model(family)


@functools.cache
def prepared(family: str) -> Prepared:
    return Prepared(model(family), inputs=support.inputs(family, 2))


@pytest.fixture(scope="module")
def compiled():
    """`compiled(family, policy)`, each once."""
    made: dict[str, Any] = {}

    def get(family: str, steps: dict[str, Any]) -> Any:
        key = f"{family}: {steps}"
        if key not in made:
            made[key] = prepared(family).compile(steps, verify=False)
        return made[key]

    yield get
    prepared.cache_clear()
    model.cache_clear()


@pytest.mark.parametrize(("family", "steps"), PATHS)
def test_compiled_equals_the_untouched_model_under_masks(compiled: Any, family: str, steps: dict[str, Any]) -> None:
    reduced = compiled(family, steps)
    assert tvc.verify(reduced, model(family), support.inputs(family, 2)).passed
    assert tvc.verify(reduced, model(family), support.inputs(family, 3)).passed


@pytest.mark.parametrize(("family", "steps"), PATHS)
def test_fewer_tokens_are_left(compiled: Any, family: str, steps: dict[str, Any]) -> None:
    """The check above compares masks; here the caches are as much shorter as the policy says."""
    batch = support.inputs(family, 1)
    cache = compiled(family, steps)(**batch).past_key_values
    visual = int(support.visual_mask(family, batch["input_ids"]).sum())
    left = visual
    lengths = [batch["input_ids"].shape[1]]
    for part in steps["steps"]:
        left = left * int(part["select"]["top"]["keep"][:-1]) // 100 + (2 if part["rest"] == MERGE else 0)
        lengths.append(lengths[0] - visual + left)
    real = [int((places >= 0).sum()) for places in cache.key_positions]
    assert real == lengths[-len(real) :]
    assert real[-1] < lengths[0]


@pytest.mark.conformance
@pytest.mark.parametrize(("family", "steps"), [("qwen3_vl", TWO), ("gemma3", BLOCKS)])
def test_onnx_runtime_equals_the_untouched_model_under_masks(family: str, steps: dict[str, Any]) -> None:
    reduced = prepared(family).compile(steps, "ort", verify=False)
    assert tvc.verify(reduced, model(family), support.inputs(family, 3)).passed


# What lies between the encoder's blocks and the features: windows laid out as rows, image by image; gates, and features
# in a grid; means over frames of packed images; convolutions.
BEHIND = [pytest.param(family, marks=SLOW) for family in ("mistral3", "aya_vision", "kimi_k25", "glm4v")]


@pytest.mark.parametrize("family", BEHIND)
def test_scores_of_the_encoder_are_those_of_the_tokens_that_features_are_made_from(family: str) -> None:
    steps = policy(step("language.1", {"attention": {"of": "all", "layer": "vision.-2"}}))
    reduced = prepared(family).compile(steps, verify=False)
    for inputs in (support.inputs(family, 1), support.inputs(family, 2, images=2)):
        assert tvc.verify(reduced, model(family), inputs).passed


# Other inputs than those of the trace ---------------------------------------------------------------------------------

TRACED = [("qwen3_vl", TWO), ("gemma3", BLOCKS), ("lfm2_vl", CONVOLUTIONS), pytest.param("mistral3", TWO, marks=SLOW)]


@pytest.mark.parametrize(("family", "steps"), TRACED)
def test_other_sizes_and_numbers_of_images(compiled: Any, family: str, steps: dict[str, Any]) -> None:
    reduced = compiled(family, steps)
    seen = set()
    for batch, images, seed in ((1, 1, 3), (2, 2, 1), (1, 3, 2), (3, 1, 1)):
        inputs = support.inputs(family, batch, images=images, seed=seed)
        seen.add((inputs["input_ids"].shape, int(support.visual_mask(family, inputs["input_ids"]).sum())))
        assert tvc.verify(reduced, model(family), inputs, steps=3).passed, (batch, images, seed)
    assert len(seen) == 4


def beside_text(inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(a batch of the sample and of one without an image, padded; the latter alone)."""
    text = torch.tensor([[1, 90, 91, 92, 93, 94, 95]])
    pad = inputs["input_ids"].shape[1] - text.shape[1]
    alone = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if "mm_token_type_ids" in inputs:
        alone["mm_token_type_ids"] = torch.zeros_like(text)
    if "token_type_ids" in inputs:
        alone["token_type_ids"] = torch.zeros_like(text)
    rows = {name: torch.cat([inputs[name], torch.nn.functional.pad(row, (pad, 0))]) for name, row in alone.items()}
    return {**inputs, **rows}, alone


@pytest.mark.parametrize(("family", "steps"), TRACED)
def test_a_sample_without_an_image_in_a_batch(compiled: Any, family: str, steps: dict[str, Any]) -> None:
    reduced, first = compiled(family, steps), support.inputs(family, 1)
    both, alone = beside_text(first)
    logits = reduced(**both).logits[:, -1]
    with torch.no_grad():
        untouched = model(family)(**alone).logits[:, -1]
    torch.testing.assert_close(logits[1:], untouched, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(logits[:1], reduced(**first).logits[:, -1], atol=2e-4, rtol=2e-4)


def longer(inputs: dict[str, torch.Tensor], more: torch.Tensor) -> dict[str, torch.Tensor]:
    """`inputs` with text behind every row."""
    made = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    made["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1]), value=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in made:
            made[name] = torch.nn.functional.pad(made[name], (0, more.shape[1]))
    return made


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("family", ("lfm2_vl", "gemma3"))
def test_a_second_turn_equals_one_longer_prompt(compiled: Any, family: str, batch: int) -> None:
    """Random scores do not look at the text, so both keep the same visual tokens."""
    reduced, first = compiled(family, RANDOM), support.inputs(family, batch)
    more = torch.tensor([[90, 91, 92]]).expand(batch, -1)
    whole = longer(first, more)
    cache = reduced(**first).past_key_values
    second = reduced(input_ids=more, attention_mask=whole["attention_mask"], past_key_values=cache)
    torch.testing.assert_close(second.logits[:, -1], reduced(**whole).logits[:, -1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ("lfm2_vl", "qwen3_vl"))
def test_beams_of_everything_kept_are_the_untouched_models(compiled: Any, family: str) -> None:
    first = support.inputs(family, 2)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    got = compiled(family, WHOLE).generate(**first, **options)
    with torch.no_grad():
        want = model(family).generate(**first, **options)
    assert got.tolist() == want.tolist()
    greedy = compiled(family, WHOLE).generate(**first, **{**options, "num_beams": 1})
    assert greedy.tolist() != want.tolist()  # beams did search


# Vision paths that are not traced -------------------------------------------------------------------------------------


def test_samples_that_another_input_counts_stand_behind_cuts_of_any_size() -> None:
    """OPT's attention reshapes by the mask's number of samples; its positions turn neither queries nor keys."""
    steps = policy(
        {"at": "language.1", "select": {"every": {"frames": 2}}, "rest": "drop"},
        step("language.3", {"mean_query": "self"}),
    )
    reduced = prepared("blip-2").compile(steps, verify=False)
    assert tvc.verify(reduced, model("blip-2"), support.inputs("blip-2", 3)).passed


def test_inspection_says_why_no_cut_inside_the_encoder_is_legal() -> None:
    program = tvc.inspect(model("lfm2_vl"), inputs=support.inputs("lfm2_vl", 2))
    assert program.layout.untraced
    assert "vision" not in program.components
    vision = [site for site in program.layout.sites if site.name.startswith("vision.")]
    assert vision
    assert not any(site.legal for site in vision)
    assert {site.reason for site in vision} == {program.layout.untraced}
    assert all(site.legal for site in program.layout.sites if site.name.startswith("language."))


def test_another_target_is_refused() -> None:
    with pytest.raises(ExportError, match="no graph that could be written") as caught:
        prepared("lfm2_vl").compile(ONE, "ort", verify=False)
    assert caught.value.slug == "untraced-vision"
    assert caught.value.where == "target ort"


def test_saving_is_refused(compiled: Any, tmp_path: Any) -> None:
    with pytest.raises(ExportError) as caught:
        compiled("lfm2_vl", CONVOLUTIONS).save_pretrained(tmp_path / "out")
    assert caught.value.slug == "untraced-vision"
    assert not (tmp_path / "out").exists()


def refused(family: str, *steps: dict[str, Any]) -> SiteError:
    with pytest.raises(SiteError) as caught:
        prepared(family).compile(policy(*steps), verify=False)
    return caught.value


def test_a_score_of_the_encoder_is_refused(compiled: Any) -> None:
    compiled("lfm2_vl", CONVOLUTIONS)
    error = refused("lfm2_vl", step("language.2", {"attention": {"of": "all", "layer": "vision.1"}}))
    assert error.slug == "untraced-vision"
    assert "vision.1" in error.got
    assert prepared("lfm2_vl").survey.layout.untraced in error.got


def test_a_cut_of_the_encoder_is_refused(compiled: Any) -> None:
    compiled("lfm2_vl", CONVOLUTIONS)
    error = refused("lfm2_vl", step("vision.2", "norm"))
    assert "vision.2" in error.got
    assert prepared("lfm2_vl").survey.layout.untraced in error.got


# Layers without attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score", ({"attention": {"of": "last", "layer": "language.2"}}, {"norm": {"of": "key", "layer": "language.3"}})
)
def test_attention_of_a_convolution_is_refused(score: dict[str, Any]) -> None:
    error = refused("lfm2_vl", step("language.4", score))
    assert error.slug == "no-attention"
    assert "language.1" in error.want
    assert "language.4" in error.want


@pytest.mark.parametrize(
    ("site", "layer"), (("language.2", 1), ("language.3", 1), ("language.4", 1), ("language.5", 4))
)
def test_the_previous_layer_is_the_last_one_with_attention(site: str, layer: int) -> None:
    layout = prepared("lfm2_vl").survey.layout
    score = {"attention": {"of": "last", "layer": "previous"}}
    resolved = resolve(load_policy(policy(step(site, score))), layout)
    assert (
        resolved.steps[0].score
        == resolve(load_policy(policy(step(site, {"attention": {"of": "last", "layer": f"language.{layer}"}}))), layout)
        .steps[0]
        .score
    )
