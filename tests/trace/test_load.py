"""Loading leaves the user's model as it was."""

from __future__ import annotations

import support
from tvc.trace.load import in_evaluation, meta_copy


def test_evaluation_is_borrowed_and_given_back() -> None:
    model = support.build_model("llava").train()
    frozen = model.get_submodule("model.vision_tower").eval()
    with in_evaluation(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not any(module.training for module in frozen.modules())


def test_a_meta_copy_shares_nothing() -> None:
    model = support.build_model("llava")
    copied = meta_copy(model)
    assert type(copied) is type(model)
    assert all(parameter.is_meta for parameter in copied.parameters())
    assert copied.config is not model.config
