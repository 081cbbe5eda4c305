"""Which pixels make which visual token, against what a nudge of one pixel changes; what is beside what in a picture."""

from __future__ import annotations

import pytest
import torch

import support
from tvc.errors import TraceError
from tvc.trace.observe import Observer, observed
from tvc.verification.encoder import flat_features, token_map
from tvc.verification.pictures import Pictures, token_pixels
from tvc.verification.steps import Sample, frames_in


class Silent(Observer):
    silent = True


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_onevision", "smolvlm", "internvl", "gemma3"])
@torch.no_grad()
def test_a_pixel_moves_the_visual_token_it_belongs_to(family):
    model, inputs = support.build_model(family), support.inputs(family, 2)
    pixels = inputs["pixel_values"]
    number = int(support.visual_mask(family, inputs["input_ids"]).sum())
    # Every pixel holds its own number: what a token is made from says which ones are in it.
    counted = torch.arange(pixels.numel(), dtype=torch.float32).reshape(pixels.shape) + 1
    found = token_pixels(model, {**inputs, "pixel_values": counted}, token_map(model, inputs), number)
    assert len(found) == number
    held = found[found > 0].long() - 1
    assert len(held) == len(held.unique())

    def features(pixel):
        moved = pixels.clone()
        if pixel is not None:
            moved.view(-1)[pixel] += 3.0
        with observed(model, Silent()):
            return flat_features(model, {**inputs, "pixel_values": moved})

    still, owner = features(None), torch.full((pixels.numel(),), -1)
    owner[held] = (found > 0).nonzero()[:, 0]
    for pixel in range(5, pixels.numel(), pixels.numel() // 12):
        moved = ((features(pixel) - still).abs().amax(1) > 1e-6).nonzero().flatten().tolist()
        assert moved == [n for n in [int(owner[pixel])] if n >= 0], f"pixel {pixel}"


def test_tokens_that_no_encoder_token_ends_in_have_no_pixels():
    model, inputs = support.build_model("llava_next"), support.inputs("llava_next", 1)
    owner = token_map(model, inputs)
    number = int(support.visual_mask("llava_next", inputs["input_ids"]).sum())
    found = token_pixels(model, inputs, owner, number)
    blank = (found == 0).all(1).nonzero().flatten().tolist()
    assert blank == sorted(set(range(number)) - set(owner[owner >= 0].tolist()))
    assert 0 < len(blank) < number  # the newline behind each row


def test_tokens_of_different_numbers_of_pixels_are_refused():
    model, inputs = support.build_model("llava"), support.inputs("llava", 1)
    owner = token_map(model, inputs)
    owner[owner == 3] = 4
    with pytest.raises(TraceError, match="cannot be matched"):
        token_pixels(model, inputs, owner, int(owner.max()) + 1)


def test_the_grids_of_pictures_tell_what_is_beside_what():
    pictures = Pictures()
    pictures.note([6, 4], torch.tensor([[1, 4, 6], [1, 8, 2]]))  # 2 x 3 tokens, and 4 x 1
    pictures.note([8], torch.tensor([[2, 4, 4]]))  # two frames of 2 x 2
    pictures.note([0, 0], None)
    assert pictures.columns == [3, 1, 2, 0, 0]
    shown = torch.tensor([0] * 6 + [1] * 4 + [2] * 8)
    pictures.shown.append(shown)
    sample = Sample.fresh(0, torch.arange(3), torch.arange(18) + 3, shown)
    right, below = pictures.beside(sample, frames_in(shown, [1, 1, 2]), None)
    assert right[0].tolist() == [1, 2, -1, 4, 5, -1, *[-1] * 4, 11, -1, 13, -1, 15, -1, 17, -1]
    assert below[0].tolist() == [3, 4, 5, *[-1] * 3, 7, 8, 9, -1, 12, 13, -1, -1, 16, 17, -1, -1]
    assert pictures.rows(sample).tolist() == [[3] * 6 + [1] * 4 + [2] * 8]
    right, below = pictures.beside(sample, frames_in(shown, [1, 1, 1]), 2)
    assert right[0].tolist() == [1, -1, 3, -1, 5, -1, 7, -1, 9, -1, 11, -1, 13, -1, 15, -1, 17, -1]
    assert below[0, 10:].tolist() == [12, 13, 14, 15, 16, 17, -1, -1]
