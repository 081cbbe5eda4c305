"""Scenes and questions: the answers are worked out again from the text of the question and the pixels."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from tvc.errors import ArgumentError
from tvc.evaluation import scenes
from tvc.evaluation.scenes import Question, Scene, Thing

COUNT = 300


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, list[Question]]]:
    made = [scenes.scene(split, 7, index) for index in range(COUNT // 2) for split in scenes.SPLITS]
    return [(one, list(itertools.islice(scenes.questions(one, 7, n), 12))) for n, one in enumerate(made)]


def only(things: tuple[Thing, ...], **wanted: str) -> Thing:
    found = [one for one in things if all(getattr(one, key) == value for key, value in wanted.items())]
    assert len(found) == 1, "the question has no single referent"
    return found[0]


def middle(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def worked_out(scene: Scene, question: str) -> str:
    """The answer, from the words of the question alone."""
    words = re.findall(r"\w+", question)
    colours = [word for word in words if word in scenes.COLOURS]
    things = [word for word in words if word in scenes.THINGS]
    if "sign" in words:
        assert scene.sign is not None
        return scene.sign
    if "many" in words and colours:
        return str(len([one for one in scene.things if one.colour == colours[0]]))
    if "many" in words:
        return str(len([one for one in scene.things if not one.name.isdigit()]))
    if "side" in words or "seen" in words:
        named = [only(scene.things, name=name) for name in things]
        other, thing = named if "side" in words else named[::-1]
        (x, y), (ox, oy) = middle(thing.box), middle(other.box)
        if abs(x - ox) > abs(y - oy):
            return "left" if x < ox else "right"
        return "above" if y < oy else "below"
    if "where" in words or "part" in words:
        x, y = middle(only(scene.things, name=things[0]).box)
        row = ("top", "", "bottom")[int(y // 32)]
        column = ("left", "", "right")[int(x // 32)]
        return f"{row} {column}".strip() or "middle"
    if colours:
        return only(scene.things, colour=colours[0]).name
    return only(scene.things, name=things[0]).colour


def test_every_answer_follows_from_the_scene(drawn):
    asked = [(scene, question) for scene, several in drawn for question in several]
    for scene, question in asked:
        assert worked_out(scene, question.text) == question.answer, question.text
    assert {question.kind for _, question in asked} == set(scenes.KINDS)
    words = {(question.kind, question.answer) for _, question in asked}
    assert {answer for kind, answer in words if kind == "where"} == set(scenes.PLACES)
    assert {answer for kind, answer in words if kind == "relation"} == {"left", "right", "above", "below"}


def test_things_are_seen_in_their_colour_and_nowhere_else(drawn):
    for scene, _ in drawn:
        for one in scene.things:
            left, top, right, bottom = one.box
            part = scene.pixels[top:bottom, left:right].reshape(-1, 3).astype(float)
            # Chroma tells a thing from its muted background.
            vivid = part[np.argsort(part.max(1) - part.min(1))[-12:]].mean(0)
            nearest = min(
                scenes.COLOURS, key=lambda name: np.abs(vivid / vivid.max() - np.array(scenes.COLOURS[name])).sum()
            )
            assert nearest == one.colour


def test_boxes_lie_apart_and_inside(drawn):
    for scene, _ in drawn:
        boxes = [one.box for one in scene.things] + ([scene.sign_box] if scene.sign_box else [])
        covered = np.zeros((scenes.SIDE, scenes.SIDE), int)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= scenes.SIDE
            assert 0 <= top < bottom <= scenes.SIDE
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1
        assert (covered > 0).mean() < 0.4


def test_boxes_of_a_question_hold_what_it_asks_for(drawn):
    for scene, several in drawn:
        for question in several:
            named = [one for one in scene.things if re.search(rf"\b{one.name}\b", question.text)]
            if question.kind in ("colour", "where", "relation"):
                assert set(question.boxes) == {one.box for one in named}
            elif question.kind == "read":
                assert question.boxes == (scene.sign_box,)


def test_scenes_follow_from_split_seed_and_index():
    first, again = scenes.scene("test", 3, 5), scenes.scene("test", 3, 5)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.things == again.things
    for other in (("train", 3, 5), ("test", 4, 5), ("test", 3, 6)):
        assert not np.array_equal(first.pixels, scenes.scene(*other).pixels)


def test_digits_for_tests_are_never_trained_on():
    train, test = (
        {image.tobytes() for group in scenes._digits_of(split) for image in group} for split in scenes.SPLITS
    )
    assert sum(len(group) for split in scenes.SPLITS for group in scenes._digits_of(split)) == 1797
    assert not train & test


def test_photographs_for_tests_are_other_parts():
    train, test = (scenes._photographs(split)[0] for split in scenes.SPLITS)
    assert train.shape[1] + test.shape[1] == 640
    assert not any(np.array_equal(test[:, :1], train[:, column : column + 1]) for column in range(train.shape[1]))


def test_the_benchmark_asks_all_kinds_equally_often():
    kinds = [scenes.example("test", 0, index)[1].kind for index in range(60)]
    assert all(kinds.count(kind) == 10 for kind in scenes.KINDS)


def test_a_photograph_may_be_the_background():
    photo = np.zeros((120, 200, 3), np.uint8)
    photo[..., 1] = 200
    one = scenes.scene("test", 0, 1, photo)
    inside = np.zeros((scenes.SIDE, scenes.SIDE), bool)
    for left, top, right, bottom in (*(thing.box for thing in one.things), one.sign_box or (0, 0, 0, 0)):
        inside[top:bottom, left:right] = True
    outside = one.pixels[~inside].astype(int)
    assert np.mean(outside[:, 1] > outside[:, 0] + 20) > 0.85


def test_another_split_is_refused():
    with pytest.raises(ArgumentError, match="no such split"):
        scenes.scene("validation", 0, 0)
