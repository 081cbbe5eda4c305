"""What is asked: a task is a list of pictures, questions and right answers, the same at every run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from tvc.errors import ArgumentError
from tvc.evaluation import scenes

Match = Literal["exact", "contains"]
MATCHES: tuple[Match, ...] = ("exact", "contains")


@dataclasses.dataclass(frozen=True)
class Example:
    """A question about a picture; any of `answers` is right. `kind` groups the questions of a task."""

    image: Image.Image
    question: str
    answers: tuple[str, ...]
    kind: str


class Task(Protocol):
    """Examples by number; `facts` are what they follow from, JSON values that differ between two different tasks."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def facts(self) -> dict[str, Any]: ...


class SceneTask:
    """The built-in benchmark: `count` questions about scenes of the test split, all kinds equally often."""

    def __init__(self, count: int = 500, seed: int = 0):
        if count < 1:
            raise ArgumentError(
                "there is nothing to ask",
                where="--examples",
                got=count,
                want="at least 1",
                fix="leave it out for 500 questions",
                slug="no-examples",
            )
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        drawn, question = scenes.example("test", self.seed, index)
        return Example(drawn.image, question.text, (question.answer,), question.kind)

    def facts(self) -> dict[str, Any]:
        return {"task": "scenes", "split": "test", "seed": self.seed, "examples": self.count}


class FileTask:
    """Questions from a JSON Lines file: `{"image": path, "question": text, "answer": text or list, "kind": text}`.

    Paths are relative to the file; `kind` may be left out.

    Raises:
        ArgumentError: a line is wrong; a picture that cannot be read is named when its turn comes.
    """

    def __init__(self, path: pathlib.Path, count: int | None = None):
        self.path = path
        try:
            self._text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise _bad_file(str(path), str(problem), "check the path") from problem
        rows = [(n, line) for n, line in enumerate(self._text.splitlines(), 1) if line.strip()]
        self.rows = [_row(path, number, line) for number, line in rows][:count]
        if not self.rows:
            raise _bad_file(str(path), "no line", "write one line a question")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        try:
            with Image.open(self.path.parent / row["image"]) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, UnidentifiedImageError) as problem:
            raise _bad_file(str(self.path), str(problem), "check the picture that the line above names") from problem
        return Example(picture, row["question"], row["answers"], row["kind"])

    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._text.encode()).hexdigest()
        return {"task": self.path.name, "sha256": digest, "examples": len(self.rows)}


def _row(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
    place = f"{path}:{number}"
    try:
        given = json.loads(line)
    except json.JSONDecodeError as problem:
        raise _bad_file(place, str(problem), "write one JSON object a line") from problem
    if not isinstance(given, dict):
        raise _bad_file(place, type(given).__name__, "write one JSON object a line")
    unknown = sorted(set(given) - {"image", "question", "answer", "kind"})
    if unknown:
        raise _bad_file(place, f"unknown key {unknown[0]}", "keys are image, question, answer and kind")
    answers = given.get("answer")
    answers = [answers] if isinstance(answers, (str, int)) else answers
    texts = [given.get("image"), given.get("question"), given.get("kind", "all")]
    listed = isinstance(answers, list) and answers and all(isinstance(answer, (str, int)) for answer in answers)
    if not all(isinstance(text, str) and text for text in texts) or not listed:
        raise _bad_file(place, line[:200], 'write {"image": "a.png", "question": "what is it?", "answer": "a cat"}')
    return {"image": texts[0], "question": texts[1], "kind": texts[2], "answers": tuple(map(str, answers or ()))}


def _bad_file(where: str, got: str, fix: str) -> ArgumentError:
    return ArgumentError(
        "the questions cannot be read",
        where=where,
        got=got,
        want="a JSON Lines file of image, question and answer",
        fix=fix,
        slug="bad-questions",
    )


def batches(task: Task, start: int, size: int) -> Iterator[tuple[int, list[Example]]]:
    """(number of the first, examples) from `start` to the end, `size` at a time."""
    for first in range(start, len(task), size):
        yield first, [task[index] for index in range(first, min(first + size, len(task)))]


def is_right(reply: str, answers: Sequence[str], match: Match) -> bool:
    """Whether a reply is one of the answers (`exact`), or holds one as whole words (`contains`).

    Case, outer white space and a full stop at the end do not count.
    """
    said = normalised(reply)
    wanted = [normalised(answer) for answer in answers]
    if match == "exact":
        return said in wanted
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said) for answer in wanted)


def normalised(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").rstrip()
