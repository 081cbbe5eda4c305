"""Visual tokens that are queries: a Q-Former or a resampler makes each of all that the encoder saw.

Between encoder and decoder stands a transformer of its own, which may read a question beside the image (InstructBLIP).
The models' forward takes no text without an image, and their own `generate` goes around it.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared, layout_of
from tvc.errors import InputError, ModelError, SiteError

FAMILIES = ("blip-2", "instructblip")
WHOLE = {"at": "language.2", "score": "random", "select": {"top": {"keep": "100%"}}, "rest": "drop"}
HALF = {**WHOLE, "score": {"attention": {"of": "last", "layer": "previous"}}, "select": {"top": {"keep": "50%"}}}
QUESTION = ("qformer_input_ids", "qformer_attention_mask")


def policy(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "mine", "steps": list(steps)}


@functools.cache
def prepared(family: str) -> Prepared:
    model, processor = support.build(family)
    return Prepared(model, processor=processor)


def asked(family: str, batch: int) -> dict[str, torch.Tensor]:
    """A padded batch in which every sample has a picture and a question of its own."""
    return support.inputs(family, batch, seed=batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_query_stands_for_a_token_of_the_encoder(family: str) -> None:
    layout = prepared(family).survey.layout
    inside = [site for site in layout.sites if site.name.startswith("vision.")]
    assert len(inside) == 4
    assert all(not site.legal and "qformer" in site.reason for site in inside)
    assert all(site.legal for site in layout.sites if site not in inside)
    assert layout.columns("projector") is None  # 16 queries, and no grid of 4 x 4
    tokens = sum(layout.visual_tokens) // 2
    assert tokens == int(support.visual_mask(family, support.inputs(family, 1)["input_ids"]).sum())


@pytest.mark.parametrize("site", ("projector", "vision.2"))
def test_what_the_encoder_says_of_its_tokens_is_refused(site: str) -> None:
    score = {"attention": {"of": "cls", "layer": "vision.1"}} if site == "projector" else "norm"
    with pytest.raises(SiteError, match="qformer"):
        prepared("blip-2").compile(policy({**WHOLE, "at": site, "score": score}), verify=False)


@pytest.mark.parametrize("family", ("idefics2", "aria", "granite4_vision"))
def test_resamplers_are_seen_by_their_attention(family: str) -> None:
    layout = layout_of(support.build_model(family), inputs=support.inputs(family, 2))
    assert layout.apart


@pytest.mark.parametrize("family", ("llava", "gemma3", "smolvlm", "got_ocr2", "video_llava"))
def test_projectors_that_join_neighbours_are_no_resamplers(family: str) -> None:
    assert not layout_of(support.build_model(family), inputs=support.inputs(family, 2)).resampled


def test_the_question_reaches_the_queries() -> None:
    """The graph takes it as an input: another question for the same picture is another answer, the model's own."""
    whole, model = prepared("instructblip").compile(policy(WHOLE), verify=False), prepared("instructblip").source.model
    assert set(QUESTION) <= set(whole.engine.interface.inputs["vision"])
    given = asked("instructblip", 1)
    other = {**given, "qformer_input_ids": given["qformer_input_ids"].flip(1)}
    with torch.no_grad():
        want = model(**other).logits[:, -1]  # type: ignore[misc]
    torch.testing.assert_close(whole(**other).logits[:, -1], want, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(whole(**given).logits[:, -1], want, atol=1e-2)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    batch = asked("instructblip", 3)
    assert whole.generate(**batch, **options).tolist() == model.generate(**batch, **options).tolist()  # type: ignore[union-attr]


@pytest.mark.conformance
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ("torch", "ort"))
def test_compiled_equals_the_untouched_model_under_masks(family: str, target: str) -> None:
    made, model = prepared(family).compile(policy(HALF), target, verify=False), prepared(family).source.model
    for batch in (1, 3):
        assert tvc.verify(made, model, asked(family, batch)).passed, batch


@pytest.mark.conformance
@pytest.mark.parametrize("beams", (1, 3))
def test_generate_goes_as_the_models_own(beams: int) -> None:
    whole, model = prepared("blip-2").compile(policy(WHOLE), verify=False), prepared("blip-2").source.model
    given, options = asked("blip-2", 3), {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    got = whole.generate(**given, **options, num_beams=beams)
    assert got.tolist() == model.generate(**given, **options, num_beams=beams).tolist()  # type: ignore[union-attr]


@pytest.mark.conformance
def test_learned_positions_leave_padding_out_of_account() -> None:
    """OPT adds an embedding of a token's place, counted without padding, in a call as in `generate`."""
    whole, model = prepared("blip-2").compile(policy(WHOLE), verify=False), prepared("blip-2").source.model
    given = asked("blip-2", 3)
    assert not bool(given["attention_mask"].all())
    with torch.no_grad():
        want = model(**given).logits[:, -1]  # type: ignore[misc]
    torch.testing.assert_close(whole(**given).logits[:, -1], want, atol=2e-4, rtol=2e-4)
    more = torch.tensor([[90, 91, 92]]).expand(3, -1)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 3), value=1)
    longer = {**given, "input_ids": torch.cat([given["input_ids"], more], 1), "attention_mask": mask}
    turn = whole(input_ids=more, attention_mask=mask, past_key_values=whole(**given).past_key_values)
    with torch.no_grad():
        want = model(**longer).logits[:, -1]  # type: ignore[misc]
    torch.testing.assert_close(turn.logits[:, -1], want, atol=2e-4, rtol=2e-4)


@pytest.mark.conformance
def test_text_alone_is_written_on_by_the_language_model() -> None:
    made, model = prepared("blip-2").compile(policy(HALF), verify=False), prepared("blip-2").source.model
    text = {"input_ids": torch.tensor([[1, 90, 91, 92]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        want = model.language_model(**text).logits[:, -1]  # type: ignore[union-attr, operator]
    torch.testing.assert_close(made(**text).logits[:, -1], want, atol=2e-4, rtol=2e-4)


@pytest.mark.conformance
def test_queries_of_another_type_than_the_decoder() -> None:
    """Q-Formers are kept in float32 beside a decoder in half precision; their parameters come first in the model."""
    model = support.build_model("blip-2").to(torch.bfloat16)
    model.qformer.float()
    model.query_tokens.data = model.query_tokens.data.float()
    made = tvc.compile(model, policy(HALF), inputs=asked("blip-2", 3))
    assert made.dtype == torch.bfloat16


@pytest.mark.conformance
def test_an_artifact_takes_the_question(tmp_path: Any) -> None:
    made = prepared("instructblip").compile(policy(HALF), "ort", verify=False)
    made.save_pretrained(tmp_path / "out")
    given = asked("instructblip", 3)
    again = tvc.load(tmp_path / "out")
    torch.testing.assert_close(again(**given).logits, made(**given).logits, atol=0, rtol=0)


@pytest.mark.conformance
def test_a_question_that_the_graph_has_no_place_for_is_refused() -> None:
    sample = {name: value for name, value in asked("instructblip", 2).items() if name != QUESTION[1]}
    made = tvc.compile(prepared("instructblip").source.model, policy(HALF), inputs=sample, verify=False)
    with pytest.raises(InputError, match=QUESTION[1]) as caught:
        made(**asked("instructblip", 3))
    assert caught.value.slug == "untraced-input"


@pytest.mark.parametrize(
    ("family", "slug", "reason"),
    [
        ("florence2", "no-decoder", "an encoder and a decoder of text"),
        ("llama4", "unknown-attention", "chunked_attention"),
    ],
)
def test_decoders_without_visual_tokens_in_their_sequence_are_refused_by_name(
    family: str, slug: str, reason: str
) -> None:
    with pytest.raises(ModelError) as caught:
        tvc.inspect(support.build_model(family), inputs=support.inputs(family, 2))
    assert caught.value.slug == slug
    assert reason in caught.value.got
    with pytest.raises(ModelError) as caught:
        tvc.plan(support.build_model(family), "fastv")
    assert caught.value.slug == slug
