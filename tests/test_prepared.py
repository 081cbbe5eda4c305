"""Several models of one `Prepared`: each goes on answering by its own policy; windows that no configuration tells."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared

QUARTER = {
    "version": 1,
    "name": "quarter",
    "steps": [{"at": "language.3", "score": "norm", "select": {"top": {"keep": "25%"}}, "rest": "drop"}],
}


def test_the_first_model_is_not_changed_by_the_second() -> None:
    model, processor = support.build("qwen2_5_vl")
    prepared = Prepared(model, processor=processor)
    inputs = support.inputs("qwen2_5_vl", 2)
    first = prepared.compile("fastv", verify=False)
    kept, answer = first(**inputs).kept, first.generate(**inputs, max_new_tokens=4)
    second = prepared.compile(QUARTER, verify=False)
    # Two beams of two samples: as many rows as the position ids have axes.
    second.generate(**inputs, max_new_tokens=4, num_beams=2)
    assert list(second(**inputs).kept) == ["language.3"]
    assert torch.equal(first.generate(**inputs, max_new_tokens=4), answer)
    assert {site: rows.tolist() for site, rows in first(**inputs).kept.items()} == {
        site: rows.tolist() for site, rows in kept.items()
    }


@pytest.mark.parametrize("site", (pytest.param("language.0", marks=pytest.mark.conformance), "language.2"))
def test_a_window_that_only_the_attention_tells(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's layers all have the window of the configuration, which lists no kinds of layers."""
    record = support.family_record("llava")
    config: dict[str, Any] = copy.deepcopy(dict(record.config))
    config["text_config"] |= {"model_type": "mistral", "head_dim": 16, "sliding_window": 16}
    monkeypatch.setitem(support.FURTHER, "windowed", dataclasses.replace(record, config=config))
    model, processor = support.build("windowed")
    step = {"at": site, "select": {"stride": {"keep": "50%"}}, "rest": "drop"}
    compiled = tvc.compile(model, {"version": 1, "name": "mine", "steps": [step]}, processor=processor)
    assert compiled.engine.interface.windows == (16,)
