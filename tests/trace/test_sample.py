"""Samples made for a model: what happens where its own image processor cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import support
import tvc
from tvc.errors import ModelError
from tvc.trace import sample
from tvc.trace.layout import meta_model
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


@pytest.mark.parametrize(("name", "kind"), [("Inkling2Config", "hybrid"), ("MistralLarge4Config", "indexed_attention")])
def test_kinds_of_layers_are_looked_at_before_anything_runs(name: str, kind: str) -> None:
    """Published sizes, without weights; an image processor that needs a package is not asked for."""
    config = getattr(transformers, name)()
    with pytest.raises(ModelError, match="kind that no cut is known for") as caught:
        survey(meta_model(config))
    assert kind in caught.value.got
