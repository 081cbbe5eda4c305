"""Which families' videos are one run of visual tokens whose positions tell frames, by the families' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
from tvc.trace.layout import meta_model
from tvc.trace.survey import Survey, survey
from tvc.trace.videos import tells_frames


def surveyed(family: str) -> Survey:
    return survey(meta_model(support.build_model(family).config), support.build_processor(family))


@pytest.mark.parametrize(
    ("family", "serial"),
    [
        ("qwen2_vl", True),
        ("qwen2_5_vl", True),
        ("qwen3_vl", False),  # a text of its own stands in front of each frame
        ("glm4v", False),
        ("llava_onevision", False),  # numbers tokens along one axis
        ("llava", False),  # takes no videos
    ],
)
def test_the_familys_own_positions_say_whether_frames_are_told(family: str, serial: bool) -> None:
    assert surveyed(family).layout.serial is serial


def test_only_two_images_that_are_alike_stand_for_frames() -> None:
    made = surveyed("qwen2_5_vl")

    def embed(ids: torch.Tensor, _path: str) -> torch.Tensor:
        return torch.zeros(*ids.shape, made.layout.hidden_size)

    def told(**changes: Any) -> bool:
        return tells_frames(made.host, {**made.sample, **changes}, embed)

    grids = made.sample["image_grid_thw"]
    assert told()
    assert not told(image_grid_thw=grids[:1])
    assert not told(image_grid_thw=grids.flip(0) * torch.tensor([[1, 1, 1], [1, 2, 1]]))
    # Two frames of fewer tokens than the code counts in them are refused by that code.
    assert not told(image_grid_thw=grids * torch.tensor([1, 2, 1]))
