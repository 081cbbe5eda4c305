"""Processors load from plain directories, without a video part and without torchvision."""

from __future__ import annotations

import pathlib

import pytest
import torch
import transformers

import support
from tvc.errors import ModelError
from tvc.trace.processor import image_only, load_processor


@pytest.mark.parametrize("family", support.PROCESSED)
def test_load_processor_gives_back_what_was_saved(family: str, tmp_path: pathlib.Path) -> None:
    directory = support.save_model(family, tmp_path / "model")
    loaded = load_processor(str(directory))
    expected, got = support.inputs(family, batch=3), support.inputs(family, batch=3, processor=loaded)
    assert type(loaded).__name__ == support.family_record(family).processor
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_image_only_keeps_a_class_without_a_video_part() -> None:
    assert image_only(transformers.LlavaProcessor) is transformers.LlavaProcessor


def test_image_only_drops_the_video_part() -> None:
    assert image_only(transformers.Qwen2_5_VLProcessor).get_attributes() == ["image_processor", "tokenizer"]


@pytest.mark.parametrize(
    ("narrowed", "like"), (("LlavaNextVideoProcessor", "LlavaNextProcessor"), ("VideoLlavaProcessor", "LlavaProcessor"))
)
def test_image_only_puts_parts_in_their_places_wherever_the_video_part_stands(
    narrowed: str, like: str, tmp_path: pathlib.Path
) -> None:
    """The video part is the first of one class and the second of the other; images come out as of the image class."""
    family = "llava_next_video" if "Next" in narrowed else "llava"
    record = support.family_record(family)
    parts = {
        "image_processor": getattr(transformers, record.image_processor)(**record.image_options),
        "tokenizer": support.tokenizer(family),
        **record.processor_options,
    }
    made = image_only(getattr(transformers, narrowed))(**parts)
    made.save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path))
    assert type(loaded).__name__ == narrowed
    text, images = ["<image> what?", "a <image>"], [support.photo(0, (131, 97)), support.photo(1, (101, 163))]
    want = getattr(transformers, like)(**parts)(images=images, text=text, padding=True, return_tensors="pt")
    for processor in (made, loaded):
        got = processor(images=images, text=text, padding=True, return_tensors="pt")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_load_processor_refuses_a_directory_without_one(tmp_path: pathlib.Path) -> None:
    support.build_model("llava").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no-processor") as caught:
        load_processor(str(tmp_path))
    assert str(tmp_path) in caught.value.where


def test_load_processor_refuses_a_processor_without_an_image_part(tmp_path: pathlib.Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "WhisperProcessor"}')
    with pytest.raises(ModelError, match="no-image-processor"):
        load_processor(str(tmp_path))


def test_load_processor_names_the_file_that_is_missing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    with pytest.raises(ModelError, match="bad-processor"):
        load_processor(str(tmp_path))
