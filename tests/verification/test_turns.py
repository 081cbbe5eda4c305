"""Calls that follow each other, as samples of one prompt: each has its own columns, and may look back."""

from __future__ import annotations

import pytest
import torch

import support
from tvc.verification import samples
from tvc.verification.turns import before, parted, positions, talk_of

#      pads  text  first image  text  | pads  second image  text  third image  text
OWNER = [-1, -1, 4, 4, 4, -1, -1, -1, 7, 7, -1, 4, 9, -1]
MASK = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]).bool()


def test_each_call_has_its_own_tokens_and_images() -> None:
    owner = torch.tensor(OWNER)
    first, second = parted(2, MASK, owner >= 0, owner, (0, 6))
    assert (first.start, first.stop, second.start, second.stop) == (0, 6, 6, 14)
    assert (first.slots.tolist(), second.slots.tolist()) == ([2, 3, 4], [8, 9, 11, 12])
    assert (first.text.tolist(), second.text.tolist()) == ([1, 5], [7, 10, 13])
    assert (first.segment.tolist(), second.segment.tolist()) == ([0, 0, 0], [0, 0, 1, 2])
    assert (first.number.tolist(), second.number.tolist()) == ([0, 1, 2], [3, 4, 5, 6])  # through the sample
    assert second.origin.tolist() == [0, 1, 2, 3]  # through the call
    assert second.within(torch.arange(14)).tolist() == list(range(6, 14))
    assert before([first, second], first) == []
    (earlier,) = before([first, second], second)
    assert earlier is first
    whole = second.behind([first])
    assert whole.slots.tolist() == [2, 3, 4, 8, 9, 11, 12]
    assert whole.segment.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert whole.scope("image").counts.tolist() == [[3, 2, 1, 1]]


def test_a_call_without_an_image_brings_no_token() -> None:
    owner = torch.where(torch.arange(14) < 6, torch.tensor(OWNER), -1)
    first, second = parted(0, MASK, owner >= 0, owner, (0, 6))
    assert (len(first.slots), len(second.slots), second.images) == (3, 0, 0)
    assert second.behind([first]).number.tolist() == [0, 1, 2]
    (only,) = parted(0, MASK, owner >= 0, owner, (0,))
    assert only.text.tolist() == [1, 5, 7, 8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_two_calls_are_one_prompt(family: str) -> None:
    """Samples of two lengths: the pixels of the one prompt are, sample by sample, those of both calls."""
    model = support.build_model(family)
    given = samples.left_padded(support.inputs(family, 1))
    talk = talk_of(model, [given, samples.lengthened(given, 3)], pad=0)
    assert talk is not None
    whole, start = talk.whole, talk.start
    assert start == given["input_ids"].shape[1] + 3
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(whole[name], torch.cat([talk.first[name], talk.second[name]], 1))
    assert (whole["attention_mask"] == 0).sum(1).tolist() == [
        3,
        3,
    ]  # in front of the one's first and the other's second
    pixels, size = whole["pixel_values"], len(given["pixel_values"])
    assert torch.equal(pixels[:size], talk.first["pixel_values"][:size])
    assert torch.equal(pixels[size : 2 * size], -given["pixel_values"])
    places = positions(model, whole, 2)
    if places is not None and places.dim() == 3:
        last = whole["attention_mask"].sum(1)
        assert bool((places[..., -1] == places[..., -3] + 2).all())
        assert bool((places[..., -3].amax(0) < last).all())
