"""Kept positions of a run as panels, and token layouts of real processors."""

from __future__ import annotations

import pytest

import support
from tvc.errors import InputError
from tvc.report.panels import panels
from tvc.report.patches import View, views

GRID = [View(2, 3)]
PLACEHOLDERS = [4, 5, 6, 7, 8, 9]


def test_decoder_positions_become_tokens_of_the_photo():
    kept = {"language.2": [0, 1, 2, 3, 5, 9, 10], "language.0": [-1, -1, 0, 1, 2, 3, 4, 5, 9, 10]}
    first, second = panels(kept, PLACEHOLDERS, GRID, {"language.0": True})
    assert (first.site, first.kept, first.merged, first.dropped) == ("language.0", [0, 1, 5], [2, 3, 4], [])
    assert (second.site, second.kept, second.merged, second.dropped) == ("language.2", [1, 5], [2, 3, 4], [0])


def test_tokens_cut_in_the_encoder_stay_gone():
    kept = {"projector": [0, 2], "vision.1": [0, 2, 4], "language.10": [0, 6], "language.9": [0, 4, 6]}
    sites = panels(kept, PLACEHOLDERS, GRID)
    assert [panel.site for panel in sites] == ["vision.1", "projector", "language.9", "language.10"]
    assert [panel.kept for panel in sites] == [[0, 2, 4], [0, 2], [0, 2], [2]]
    assert sites[-1].dropped == [0, 1, 3, 4, 5]


def test_a_token_that_comes_back_is_refused():
    with pytest.raises(InputError, match="kept-out-of-range"):
        panels({"language.0": [4], "language.1": [4, 5]}, PLACEHOLDERS, GRID)


@pytest.mark.parametrize("family", list(support.FAMILIES))
@pytest.mark.parametrize("index", [0, 1])
def test_real_processors_give_as_many_places_as_the_prompt_has_placeholders(family, index):
    processor, photo = support.build_processor(family), support.photo(index)
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[photo], text=[text], return_tensors="pt")
    count = int(support.visual_mask(family, inputs["input_ids"]).sum())
    found = views(photo, count, inputs, processor.image_processor, tile_side=4)
    assert sum(view.tokens for view in found) == count
    boxes = [view.box(token) for view in found if view.canvas == 0 for token in range(view.tokens)]
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in boxes if box is not None)
    cropped = family == "llava" and index == 1
    assert area == pytest.approx(2 / 3 if cropped else 1.0)
