"""Visual tokens that take fractions of a position, against the untouched model called with these positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import support
import tvc
from tvc import api
from tvc.errors import SiteError

STRIDE = 64


def numbered(valid: torch.Tensor, image: list[list[int]], stride: int = STRIDE) -> torch.Tensor:
    """[B, S] float32 positions: text counts from the whole number above, an image's i-th token is i strides behind."""
    made = torch.zeros(valid.shape)
    for row, images in enumerate(image):
        last, before, front, number = -1.0, -1, 0.0, 0
        for column, own in enumerate(images):
            if not valid[row, column]:
                continue
            if own < 0:
                last = math.ceil(last) + 1.0
            else:
                front, number = (front, number + 1) if own == before else (float(math.ceil(last)), 1)
                last = front + number * stride / 256
            before, made[row, column] = own, last
    return made


def given(images: int = 2) -> tuple[dict[str, Any], torch.Tensor]:
    """A padded batch of three with images side by side, and the positions of its tokens."""
    inputs = support.inputs("llava", 3, images=images)
    visual = support.visual_mask("llava", inputs["input_ids"])
    each = int(visual[0].sum()) // images
    number = (visual.long().cumsum(1) - 1) // each
    return inputs, numbered(inputs["attention_mask"].bool(), torch.where(visual, number, -1).tolist())


@pytest.fixture(scope="module")
def prepared() -> tuple[Any, api.Prepared]:
    model, processor = support.build("llava")
    return model, api.Prepared(model, processor=processor)


@pytest.fixture(scope="module", params=["torch", pytest.param("ort", marks=pytest.mark.conformance)])
def compiled(request: pytest.FixtureRequest, prepared: tuple[Any, api.Prepared]) -> Any:
    return prepared[1].compile("v2pe", request.param, verify=False)


def test_prompts_decode_steps_and_later_turns_equal_the_model_at_these_positions(
    prepared: tuple[Any, api.Prepared], compiled: Any
) -> None:
    inputs, positions = given()
    steps = 4
    ids = compiled.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + steps
    answer = compiled(**inputs)
    more = torch.tensor([[5, 6, 7]] * 3)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    later = compiled(input_ids=more, attention_mask=mask, past_key_values=answer.past_key_values)

    def dense(tokens: torch.Tensor) -> torch.Tensor:
        behind = positions[:, -1:] + 1 + torch.arange(tokens.shape[1])
        whole = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
        sequence = torch.cat([inputs["input_ids"], tokens], 1)
        own = {"pixel_values": inputs["pixel_values"], "position_ids": torch.cat([positions, behind], 1)}
        with torch.no_grad():
            return prepared[0](input_ids=sequence, attention_mask=whole, **own).logits

    new = ids[:, -steps:]
    logits = dense(new)
    assert torch.equal(logits[:, -steps - 1 : -1].argmax(-1), new)
    near = {"atol": 2e-5 * float(logits.abs().max()), "rtol": 0.0}
    torch.testing.assert_close(answer.logits[:, -1], logits[:, -steps - 1], **near)
    torch.testing.assert_close(later.logits[:, -1], dense(more)[:, -1], **near)
    untouched = prepared[0](**inputs).logits[:, -1]
    assert (answer.logits[:, -1] - untouched).abs().max() > 0.1  # the positions make a difference


def test_an_artifact_counts_as_the_model_that_was_saved(compiled: Any, tmp_path: Any) -> None:
    inputs, _ = given(images=1)
    compiled.save_pretrained(tmp_path / "out")
    again = tvc.load(tmp_path / "out")
    assert again.engine.interface.shape.stride == STRIDE
    first, second = compiled(**inputs), again(**inputs)
    near = 2e-5 * float(first.logits.abs().max())
    torch.testing.assert_close(second.logits, first.logits, atol=near, rtol=0.0)
    assert second.past_key_values.saved.tolist() == first.past_key_values.saved.tolist()


@pytest.mark.conformance
def test_reduced_tokens_keep_the_fractions_that_they_entered_with(prepared: tuple[Any, api.Prepared]) -> None:
    """Verified against the untouched model under masks, at positions counted token by token."""
    policy = {
        "version": 1,
        "name": "both",
        "steps": [
            {"at": "projector", "select": {"stride": "50%"}},
            {"at": "language.2", "score": {"norm": {"of": "feature"}}, "select": {"top": "50%"}},
        ],
        "positions": {"stride": 96},
    }
    report = prepared[1].compile(policy).verification
    assert report is not None
    assert all(row["passed"] for row in report["comparisons"])


@pytest.mark.parametrize(
    ("family", "reason"),
    [("qwen2_5_vl", "positions on 3 axes"), ("blip-2", "looks positions up in a table")],
)
def test_decoders_that_take_no_fraction_are_refused_with_the_reason(family: str, reason: str) -> None:
    model, processor = support.build(family)
    with pytest.raises(SiteError, match=reason) as caught:
        tvc.plan(model, "v2pe", processor=processor)
    assert caught.value.slug == "no-fractions"


@pytest.mark.parametrize(("family", "reason"), [("qwen2_5_vl", "positions on 3 axes"), ("blip-2", "adds positions")])
def test_decoders_whose_tokens_keep_their_positions_are_refused_with_the_reason(family: str, reason: str) -> None:
    model, processor = support.build(family)
    with pytest.raises(SiteError, match=reason) as caught:
        tvc.plan(model, tvc.load_policy("fastv", set=["positions=renumber"]), processor=processor)
    assert caught.value.slug == "no-renumber"
