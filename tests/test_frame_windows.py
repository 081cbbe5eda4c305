"""Frames of a video pooled in groups: verified on the untouched model, and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc

PRESET = ["group=3", "near=1", "far=2"]


def test_images_of_a_prompt_are_frames_of_one_video() -> None:
    """Of five pictures of 4 x 4 tokens the first and the fourth stay whole; the merged embeddings are means."""
    model, processor = support.build("llava")
    compiled = tvc.compile(model, tvc.load_policy("visual-context-window", PRESET), processor=processor, verify=False)
    inputs = support.inputs("llava", 2, images=5)
    kept = compiled(**inputs).kept["language.0"]
    visual = support.visual_mask("llava", inputs["input_ids"])
    for row in range(2):
        slots = visual[row].nonzero().flatten().tolist()
        want = [*range(16), 16, 18, 24, 26, 32, 34, 40, 42, *range(48, 64), 64, 66, 72, 74]
        shown = [slots.index(place) for place in kept[row].tolist() if place in slots]
        assert shown == want


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["torch", "ort"])
@pytest.mark.parametrize("written", [True, False])
def test_a_video_whose_rows_are_written_or_told_by_positions(written: bool, target: str) -> None:
    """Grids of 4 x 8 and 8 x 8 (told: 8 x 6) patches, 2 x 2 of them a token; the frequencies are rescaled, too."""
    model, processor = support.build("qwen2_5_vl")
    width = ["steps.0.merge.frame_windows.columns=4"] if written else []
    policy = tvc.load_policy("visual-context-window", [*PRESET, *width])
    compiled = tvc.compile(model, policy, target, processor=processor, verify=False)
    columns = 4 if written else 3
    videos, extra = support.by_hand.video_tokens(model, [(7, 4, 8), (5, 8, 2 * columns)])
    rows: Any = [[1, 105, 106, *videos[0], 130, 131], [1, 107, *videos[1], 132, 133, 134]]
    inputs = support.by_hand.with_kinds(model, rows, extra)
    assert tvc.verify(compiled, model, inputs, steps=3).passed
    kept = compiled(**inputs).kept["language.0"]
    counts = torch.tensor([3 * 8 + 4 * 2, 2 * 4 * columns + 3 * 4])  # frames of 2 x 4 tokens and of 4 x columns
    text = torch.tensor([len(row) for row in rows]) - torch.tensor([7 * 8, 5 * 4 * columns])
    assert (kept >= 0).sum(1).tolist() == (counts + text).tolist()
