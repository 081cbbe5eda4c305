"""Prompts whose visual tokens see some chunks of frames alone: the untouched model under masks written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared
from tvc.errors import SiteError
from tvc.verification.check import compare

FRAMES, PREVIOUS = 2, 1
CHUNKS = {"version": 1, "attention": {"chunks": {"frames": FRAMES, "previous": PREVIOUS}}}
CUT = {"at": "language.2", "score": {"attention": {"of": "last", "layer": "self"}}, "select": {"top": "50%"}}
PICTURES, TOKENS = 7, 16  # an image is a frame


@pytest.fixture(scope="module")
def made() -> tuple[Any, Prepared]:
    model, processor = support.build("llava")
    return model, Prepared(model, processor=processor)


def far(visual: torch.Tensor) -> torch.Tensor:
    """[S, S] bool: a visual token of a row, and one of a column that is too many chunks before it."""
    chunk, seen = [-1] * len(visual), 0
    for column in range(len(visual)):
        if visual[column]:
            chunk[column] = seen // TOKENS // FRAMES
            seen += 1
    rows = [[0 <= key < query - PREVIOUS for key in chunk] for query in chunk]
    return torch.tensor(rows)


def under_masks(model: Any, inputs: dict[str, torch.Tensor], masks: list[torch.Tensor]) -> torch.Tensor:
    """[B, S, vocabulary] of the untouched model with each layer under a mask of its own, [B, S, S] bool."""
    with torch.no_grad(), support.masked(model, masks):
        return model(**inputs).logits


def seen_by_all(mask: torch.Tensor) -> torch.Tensor:
    """[B, S, S] bool: causal, without padding; pads see themselves, so that their numbers stay finite."""
    size = mask.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    return (causal & mask[:, None, :].bool()) | torch.eye(size, dtype=torch.bool)


def test_prompts_cuts_and_later_turns_equal_the_model_under_these_masks(made: tuple[Any, Prepared]) -> None:
    model, prepared = made
    compiled = prepared.compile({**CHUNKS, "steps": [CUT]}, verify=False)
    inputs = support.inputs("llava", 3, images=PICTURES)
    answer = compiled(**inputs)
    more = torch.tensor([[5, 6, 7]] * 3)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    masks = seen_by_all(whole["attention_mask"])
    visual = support.visual_mask("llava", whole["input_ids"])
    masks &= ~torch.stack([far(row) for row in visual])
    kept = answer.kept["language.2"]
    stays = torch.zeros(3, masks.shape[1] + 1, dtype=torch.bool)
    stays = stays.scatter(1, torch.where(kept < 0, masks.shape[1], kept), True)[:, :-1]
    stays[:, -3:] = True
    behind = masks & (stays[:, None, :] | torch.eye(masks.shape[1], dtype=torch.bool))
    want = under_masks(model, whole, [masks] * 2 + [behind] * 4)
    close = {"atol": 2e-5 * float(want.abs().max()), "rtol": 0.0}
    torch.testing.assert_close(answer.logits[:, 0], want[:, -4], **close)
    cache = answer.past_key_values
    later = compiled(input_ids=more, attention_mask=whole["attention_mask"], past_key_values=cache)
    torch.testing.assert_close(later.logits[:, 0], want[:, -1], **close)


@pytest.mark.conformance
def test_images_of_a_later_turn_see_all_of_the_earlier_one(made: tuple[Any, Prepared]) -> None:
    model, prepared = made
    compiled = prepared.compile(CHUNKS, verify=False)
    whole = support.inputs("llava", images=PICTURES)
    visual = support.visual_mask("llava", whole["input_ids"])[0]
    cut = int(visual.nonzero().flatten()[3 * TOKENS])  # where the fourth image begins
    ids, mask, pixels = whole["input_ids"], whole["attention_mask"], whole["pixel_values"]
    first = compiled(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], pixel_values=pixels[:3])
    given = {"input_ids": ids[:, cut:], "attention_mask": mask, "pixel_values": pixels[3:]}
    second = compiled(**given, past_key_values=first.past_key_values)
    seen = seen_by_all(mask)
    seen[:, :cut, :cut] &= ~far(visual[:cut])
    seen[:, cut:, cut:] &= ~far(visual[cut:])
    want = under_masks(model, whole, [seen] * 6)[:, -1]
    torch.testing.assert_close(second.logits[:, 0], want, atol=2e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.conformance
def test_verification_sees_prompts_without_chunks(made: tuple[Any, Prepared]) -> None:
    model, prepared = made
    plain = prepared.compile({"version": 1, "steps": [CUT]}, verify=False)
    plain.policy = prepared.compile({**CHUNKS, "steps": [CUT]}, verify=False).policy
    rows = compare(plain, model, support.inputs("llava", images=PICTURES), steps=2).comparisons
    assert {row.output for row in rows if not row.passed} >= {"logits.0", "logits.1"}


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("family", "target"),
    [
        *((name, "torch") for name in ("gemma3", "llava_onevision", "qwen2_5_vl")),
        *(("llava", target) for target in ("torch", "ort", "pt2", "torchscript")),
        ("qwen2_5_vl", "ort"),
    ],
)
def test_targets_and_families(family: str, target: str) -> None:
    model, processor = support.build(family)
    compiled = tvc.compile(model, {**CHUNKS, "steps": [CUT]}, target, processor=processor, verify=False)
    for batch in (1, 3):
        given = support.inputs(family, batch, images=PICTURES)
        assert not [row for row in compare(compiled, model, given, steps=3).comparisons if not row.passed]


@pytest.mark.conformance
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_frames_of_videos(family: str) -> None:
    model, processor = support.build(family)
    compiled = tvc.compile(model, CHUNKS, processor=processor, verify=False)
    videos, extra = support.by_hand.video_tokens(model, [(7, 4, 4), (5, 4, 8)])
    rows = [[1, 105, 106, *videos[0], 130, 131], [1, 107, *videos[1], 132, 133, 134]]
    inputs = support.by_hand.with_kinds(model, rows, extra)
    assert tvc.verify(compiled, model, inputs, steps=3).passed
    with torch.no_grad():
        untouched = model(**inputs).logits[:, -1]
    assert (compiled(**inputs).logits[:, 0] - untouched).abs().max() > 0.01  # the chunks make a difference


def test_text_that_reads_across_is_refused() -> None:
    model, processor = support.build("mllama")
    with pytest.raises(SiteError, match="no slot of the sequence"):
        tvc.compile(model, CHUNKS, processor=processor, verify=False)
