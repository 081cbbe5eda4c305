"""Options of the vision path that are given with a call: a graph has no choice about them, so they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc
from tvc.errors import InputError


@pytest.mark.parametrize("loaded", (False, True))
def test_another_layer_of_the_encoder_is_refused(artifacts: Any, loaded: bool) -> None:
    made = artifacts("llava", "fastv")
    compiled = tvc.load(made.folder) if loaded else made.compiled
    given = support.inputs("llava", 1)
    want = compiled(**given).logits
    same = compiled(**given, vision_feature_layer=-2, vision_feature_select_strategy="default").logits
    torch.testing.assert_close(same, want, atol=0, rtol=0)
    for name, value in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")):
        with pytest.raises(InputError, match=f"{name}={value}") as caught:
            compiled(**given, **{name: value})
        assert caught.value.slug == "untraced-option"
    with pytest.raises(InputError, match="vision_feature_layer"):
        compiled.generate(**given, vision_feature_layer=-1, max_new_tokens=2)


@pytest.mark.conformance
def test_what_an_input_makes_of_the_encoders_options_is_refused() -> None:
    """A mask of tiles sends all of them another way through the encoder, with four times as many tokens."""
    model, processor = support.build("granite_docling")
    compiled = tvc.compile(model, "fastv", processor=processor, verify=False)
    text, picture = "<image> what is it?", support.photo(0, (131, 97))
    coarse = processor(images=[[picture]], text=[text], return_tensors="pt")
    fine = processor(images=[[picture]], text=[text], return_tensors="pt", fine_route=True)
    assert "tile_fine_mask" in fine
    with torch.no_grad():
        assert model(**fine).logits.shape[1] > model(**coarse).logits.shape[1]
    assert tvc.verify(compiled, model, dict(coarse), steps=2).passed
    with pytest.raises(InputError, match="fine=True") as caught:
        compiled(**fine)
    assert caught.value.slug == "untraced-option"
