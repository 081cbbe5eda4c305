"""Models whose own code cannot be followed on shapes alone: the refusal says in words what that code does."""

from __future__ import annotations

import pytest

import support
import tvc
from tvc.errors import ModelError


@pytest.mark.parametrize(
    ("family", "told"),
    (("chameleon", "tensors of its own on the CPU"), ("ernie4_5_vl_moe", "reads numbers out of tensors")),
)
def test_what_cannot_be_followed_is_said_in_words(family: str, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        tvc.compile(support.build_model(family), "fastv", inputs=support.inputs(family), verify=False)
    assert told in caught.value.got
    assert "Error" not in caught.value.got
