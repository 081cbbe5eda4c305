"""Question files, and when a reply counts as right."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tvc.errors import ArgumentError
from tvc.evaluation.tasks import FileTask, SceneTask, batches, is_right


@pytest.fixture
def folder(tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save(tmp_path / "red.png")
    return tmp_path


def written(folder, *lines):
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_holds_examples(folder):
    one = {"image": "red.png", "question": "what colour?", "answer": ["red", "scarlet"], "kind": "colour"}
    task = FileTask(written(folder, one, "", {"image": "red.png", "question": "how many?", "answer": 1}))
    assert len(task) == 2
    assert (task[0].question, task[0].answers, task[0].kind) == ("what colour?", ("red", "scarlet"), "colour")
    assert (task[1].answers, task[1].kind) == (("1",), "all")
    assert task[0].image.mode == "RGB"
    assert task[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert len(FileTask(written(folder, one, one, one), 2)) == 2


def test_facts_tell_files_apart(folder):
    line = {"image": "red.png", "question": "a?", "answer": "b"}
    first = FileTask(written(folder, line)).facts()
    assert FileTask(written(folder, line)).facts() == first
    assert FileTask(written(folder, {**line, "answer": "c"})).facts() != first


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{", "questions.jsonl:2"),
        ("[1]", "list"),
        ({"image": "red.png", "question": "a?"}, "red.png"),
        ({"image": "red.png", "question": "a?", "answer": []}, "answer"),
        ({"image": "red.png", "question": "", "answer": "b"}, "question"),
        ({"image": 3, "question": "a?", "answer": "b"}, "image"),
        ({"image": "red.png", "question": "a?", "answer": "b", "answr": "b"}, "unknown key answr"),
    ],
)
def test_a_bad_line_is_named(folder, line, got):
    with pytest.raises(ArgumentError, match=got) as caught:
        FileTask(written(folder, {"image": "red.png", "question": "a?", "answer": "b"}, line))
    assert "questions.jsonl:2" in caught.value.where


@pytest.mark.parametrize("image", ["absent.png", "questions.jsonl", "../../etc"])
def test_a_picture_that_cannot_be_read_is_named(folder, image):
    task = FileTask(written(folder, {"image": image, "question": "a?", "answer": "b"}))
    with pytest.raises(ArgumentError, match=r"questions cannot be read"):
        task[0]


def test_a_file_without_lines_or_not_there_is_refused(folder):
    with pytest.raises(ArgumentError, match="no line"):
        FileTask(written(folder))
    with pytest.raises(ArgumentError, match="absent"):
        FileTask(folder / "absent.jsonl")


@pytest.mark.parametrize(
    ("reply", "answers", "exact", "contains"),
    [
        ("red", ["red"], True, True),
        (" Top  left. ", ["top left"], True, True),
        ("it is red", ["red"], False, True),
        ("scarred", ["red"], False, False),
        ("47", ["4"], False, False),
        ("4 7", ["47"], False, False),
        ("", ["red"], False, False),
        ("a cat.", ["dog", "a cat"], True, True),
        ("c++", ["c++"], True, True),
    ],
)
def test_right_and_wrong(reply, answers, exact, contains):
    assert is_right(reply, answers, "exact") is exact
    assert is_right(reply, answers, "contains") is contains


def test_batches_go_on_from_any_place():
    task = SceneTask(7, seed=2)
    got = list(batches(task, 3, 3))
    assert [(first, len(group)) for first, group in got] == [(3, 3), (6, 1)]
    assert got[1][1][0].question == task[6].question
    assert list(batches(task, 7, 3)) == []


def test_a_benchmark_without_questions_is_refused():
    with pytest.raises(ArgumentError, match="nothing to ask"):
        SceneTask(0)
