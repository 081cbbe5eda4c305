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
