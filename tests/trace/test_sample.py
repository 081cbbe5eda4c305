"""Samples made for a model: what happens where its own image processor cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import support
import tvc
from tvc.errors import ModelError
from tvc.trace import sample
from tvc.trace.layout import cost_fields, meta_model
from tvc.trace.survey import survey


def test_a_package_that_the_image_processor_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lacking:
        def __init__(self, **_options: Any):
            raise ImportError("\nImageProcessor requires the Torchvision library\n")

    monkeypatch.setattr(sample, "get_image_processor_class_from_name", lambda _name: Lacking)
    with pytest.raises(ModelError, match="requires the Torchvision library") as caught:
        tvc.plan(support.build_model("llava"), "fastv")
    assert caught.value.slug == "no-sample"
    assert "inputs=" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Inkling2Config", "hybrid"),
        ("InklingConfig", "hybrid"),
        ("MistralLarge4Config", "indexed_attention"),
        ("Dots3NoteConfig", "indexed_attention"),
        ("UnlimitedOcrConfig", "reference_sliding_attention"),
        ("Glm5NextConfig", "linear_attention"),
        ("NemotronH_Omni_Reasoning_V3_Config", "linear_attention"),
        ("MiniCPMOcrConfig", "linear_attention"),
    ],
)
def test_kinds_of_layers_are_looked_at_before_anything_runs(name: str, said: str) -> None:
    """Published sizes, without weights; an image processor that needs a package is not asked for."""
    config = getattr(transformers, name)()
    if config.image_token_id is None:  # published configurations name it, defaults need not
        config.image_token_id = 7
    with pytest.raises(ModelError) as caught:
        survey(meta_model(config))
    assert caught.value.slug == ("no-kv-layer" if said == "linear_attention" else "unknown-attention")
    assert said in caught.value.got


def test_a_model_of_videos_alone_is_refused_as_such() -> None:
    config = transformers.InstructBlipVideoConfig(video_token_index=7)
    with pytest.raises(ModelError, match="takes no images") as caught:
        survey(meta_model(config), inputs={"pixel_values": torch.zeros(1, 4, 3, 224, 224)})
    assert caught.value.slug == "no-visual-tokens"


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 3, 14, 14 * 240), -1),  # the patches of all images side by side
        ((1, 3, 14, 14), 0),  # a picture of one patch
        ((1, 3, 28, 14 * 240), 0),  # a picture that is wider than high
        ((2, 3, 14, 14 * 240), 0),
        ((1, 240, 588), 0),
    ],
)
def test_strips_of_patches_go_on_along_their_last_axis(shape: tuple[int, ...], axis: int) -> None:
    model, pixels = support.build_model("minicpmv4_6"), torch.zeros(shape)
    assert sample.sample_axis(model, "pixel_values", pixels) == axis
    twice = sample.doubled(model, {"pixel_values": pixels, "target_sizes": torch.ones(3, 2)})
    assert twice["pixel_values"].shape[axis] == 2 * shape[axis]
    assert twice["target_sizes"].shape == (6, 2)


def test_what_a_configuration_says_of_one_layer_is_read_there() -> None:
    """Every other layer of this decoder has half the heads; a window is only where attention slides."""
    language = cost_fields(support.build_model("dots3_note"))["language"]
    assert [(layer.heads, layer.window) for layer in language] == [(4, 0), (2, 24)] * 2
