"""Replies on disk: what a kill leaves behind, and what is not gone on with."""

from __future__ import annotations

import json
import os

import pytest

from tvc.errors import ArgumentError
from tvc.evaluation.records import Record, Records

FACTS = {"task": "scenes", "seed": 0, "share": (1, 2)}
HEAD = {"policy": "abc"}
SAID = [Record("what", f"reply {n}", n, n % 2 == 0) for n in range(4)]


def test_replies_come_back_in_order(tmp_path):
    records = Records(tmp_path / "a" / "b", FACTS)
    assert records.read("fastv-50", HEAD) == []
    records.append("fastv-50", HEAD, SAID[:3])
    records.append("fastv-50", HEAD, SAID[3:])
    assert Records(tmp_path / "a" / "b", FACTS).read("fastv-50", HEAD) == SAID


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_that_was_cut_short_is_asked_again(tmp_path, cut):
    records = Records(tmp_path, FACTS)
    records.append("x", HEAD, SAID)
    path = tmp_path / "answers" / "x.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-cut])
    found = records.read("x", HEAD)
    assert found == SAID[:3] if cut < 60 else found == SAID[: len(found)]
    records.append("x", HEAD, SAID[len(found) :])
    assert path.read_text() == whole


def test_a_head_that_was_cut_short_is_written_again(tmp_path):
    records = Records(tmp_path, FACTS)
    (tmp_path / "answers" / "x.jsonl").write_text('{"poli')
    assert records.read("x", HEAD) == []
    records.append("x", HEAD, SAID)
    assert records.read("x", HEAD) == SAID


def test_another_evaluation_is_not_gone_on_with(tmp_path):
    Records(tmp_path, FACTS)
    with pytest.raises(ArgumentError, match="another evaluation") as caught:
        Records(tmp_path, {**FACTS, "seed": 1})
    assert (caught.value.got, caught.value.want) == ("seed: 0", "seed: 1")


def test_replies_of_another_policy_are_not_gone_on_with(tmp_path):
    records = Records(tmp_path, FACTS)
    records.append("x", HEAD, SAID)
    with pytest.raises(ArgumentError, match="another evaluation"):
        records.read("x", {"policy": "def"})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"other": 1})])
def test_a_directory_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ArgumentError, match="another evaluation"):
        Records(tmp_path, FACTS)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot be kept there"):
        Records(tmp_path / "file" / "x", FACTS)


def test_nothing_is_left_beside_the_files(tmp_path):
    Records(tmp_path, FACTS).append("x", HEAD, SAID)
    assert sorted(os.listdir(tmp_path)) == ["answers", "study.json"]
