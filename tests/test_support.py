"""The tiny models are worth testing with: logits vary, pictures matter, padding does not."""

from __future__ import annotations

import pytest
import torch
import transformers

import support


@pytest.mark.parametrize("family", [*support.FAMILIES, *support.FURTHER])
def test_pictures_change_the_logits(family: str) -> None:
    model, given = support.build_model(family), support.inputs(family, batch=3)
    visual = support.visual_mask(family, given["input_ids"])
    other = {name: -value if "pixel_values" in name else value for name, value in given.items()}
    with torch.no_grad():
        seen, unseen = model(**given).logits[:, -1], model(**other).logits[:, -1]
    assert visual.any(1).all()
    assert seen.std() > 0.1
    assert ((seen - unseen).abs().amax(1) > 1e-2).all()


@pytest.mark.parametrize("family", [*support.FAMILIES, *support.FURTHER])
def test_batches_are_padded_on_the_left(family: str) -> None:
    given = support.inputs(family, batch=3)["attention_mask"]
    assert given.sum(1).min() < given.shape[1]
    assert given[:, -1].all()
    assert support.inputs(family, batch=3, padded=False)["attention_mask"].all()


@pytest.mark.parametrize("family", [*support.FAMILIES, *support.FURTHER])
def test_saved_directory_holds_the_same_model(family: str, tmp_path) -> None:
    directory, given = support.save_model(family, tmp_path), support.inputs(family)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(directory)
    with torch.no_grad():
        # Loaded weights may lie differently in memory, which changes the order of sums.
        torch.testing.assert_close(loaded(**given).logits, support.build_model(family)(**given).logits)
