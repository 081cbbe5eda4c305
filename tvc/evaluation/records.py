"""Keeps every reply as it comes, so that a killed evaluation goes on where it was.

A directory holds `study.json`, what the evaluation follows from; and `answers/<name>.jsonl`, for each model a first
line that says what it was, then a line an example.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tvc.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Record:
    """One answered example; `kind` is the question's."""

    kind: str
    text: str
    first: int  # token id
    right: bool


class Records:
    """The replies of one evaluation directory."""

    def __init__(self, folder: pathlib.Path, facts: Mapping[str, Any]):
        """Opens or makes the directory; `facts` are what all replies in it follow from.

        Raises:
            ArgumentError: it holds another evaluation, or cannot be written.
        """
        self.folder, self._file = folder, folder / "study.json"
        wanted = json.loads(json.dumps(facts))
        try:
            (folder / "answers").mkdir(parents=True, exist_ok=True)
            if self._file.exists():
                self._compare(json.loads(self._file.read_text(encoding="utf-8")), wanted)
            elif any((folder / "answers").iterdir()):
                raise self._other("answers without a study.json", "an empty directory")
            else:
                write_whole(self._file, json.dumps(wanted, indent=1) + "\n")
        except OSError as problem:
            raise ArgumentError(
                "the evaluation cannot be kept there",
                where="--output",
                got=f"{folder}: {problem.strerror or problem}",
                want="a directory that can be written",
                fix="choose another directory",
                slug="cannot-write",
            ) from problem
        except ValueError as problem:
            raise self._other(f"a study.json that is no JSON: {problem}", "an evaluation of tvc") from problem

    def _compare(self, found: Any, wanted: Mapping[str, Any]) -> None:
        if found == wanted:
            return
        keys = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        key = keys[0] if keys else "other keys"
        got = found.get(key) if isinstance(found, dict) else found
        raise self._other(f"{key}: {got}", f"{key}: {wanted.get(key)}")

    def _other(self, got: str, want: str) -> ArgumentError:
        return ArgumentError(
            "the directory holds another evaluation, whose answers cannot be gone on with",
            where=str(self.folder),
            got=got,
            want=want,
            fix="give another directory with -o, or remove this one",
            slug="other-evaluation",
        )

    def read(self, name: str, head: Mapping[str, Any]) -> list[Record]:
        """The replies of a model so far, in the order of the examples; a line that a kill cut short is taken away.

        Raises:
            ArgumentError: the file holds the replies of something else than `head` says.
        """
        path = self._path(name)
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if text and not text.endswith("\n"):
            lines = lines[:-1]
            write_whole(path, "".join(f"{line}\n" for line in lines))
        if not lines:
            return []
        found = json.loads(lines[0])
        if found != json.loads(json.dumps(head)):
            raise self._other(f"{path.name}: {lines[0][:300]}", json.dumps(head)[:300])
        return [Record(**json.loads(line)) for line in lines[1:]]

    def append(self, name: str, head: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Adds replies; they are on disk when this returns."""
        path = self._path(name)
        begins = not path.exists() or not path.stat().st_size
        lines = [json.dumps(head)] * begins + [json.dumps(dataclasses.asdict(record)) for record in records]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / "answers" / f"{name}.jsonl"


def write_whole(path: pathlib.Path, text: str) -> None:
    """Written beside its place and moved there: never half a file."""
    beside = path.with_suffix(path.suffix + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
