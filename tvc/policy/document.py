"""A policy as plain data, with the file and line each value came from.

YAML is read through composed nodes: nothing is constructed from a tag, so reading a policy can't run code, and every
node still knows its line. Anchors are refused: a few lines of them expand to gigabytes.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from tvc.errors import PolicyError

Path = tuple[str | int, ...]
MAX_DEPTH = 24

_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null")}


def dotted(path: Path) -> str:
    """`("steps", 0, "select")` as `steps[0].select`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like `word`, or None where nothing comes close."""
    words = {k.lower(): k for k in known}
    longer = [k for k in words if k.startswith(f"{word.lower()}-")]  # of flash, flash-latents rather than fastv
    found = difflib.get_close_matches(word.lower(), longer or words, n=1, cutoff=0.0 if longer else 0.5)
    return words[found[0]] if found else None


@dataclasses.dataclass(frozen=True)
class Document:
    """Nested mappings, lists and scalars; `marks` says for a path which file and line wrote the value there.

    `files` are the sources among them that are files: what a value names lies beside the file that wrote it.
    """

    data: Any
    marks: Mapping[Path, str]
    source: str
    files: frozenset[str] = frozenset()

    def get(self, path: Path) -> Any:
        """The value at `path`, or None where there is none."""
        value = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def where(self, path: Path) -> str:
        """`file:line, dotted.path`, the line of the closest ancestor where the value itself has none."""
        mark = self.mark(path)
        return f"{mark}, {dotted(path)}" if path else mark

    def mark(self, path: Path) -> str:
        return next((self.marks[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.marks), self.source)

    def folder(self, path: Path) -> pathlib.Path:
        """Where relative paths in the value at `path` start: beside its file, or in the working directory."""
        source = self.mark(path).rpartition(":")[0]
        return pathlib.Path(source).parent if source in self.files else pathlib.Path()

    def error(self, path: Path, summary: str, *, got: object, want: object, fix: str, slug: str) -> PolicyError:
        return PolicyError(summary, where=self.where(path), got=got, want=want, fix=fix, slug=slug)

    def unknown(self, path: Path, key: str, known: Iterable[str], what: str) -> PolicyError:
        """The refusal of a key that is none of `known`; `path` is where it stands."""
        known = sorted(known)
        close = nearest(key, known)
        return self.error(
            path,
            f"{what} has a key that the policy language does not know",
            got=key,
            want=f"one of {', '.join(known)}" if known else "no key at all",
            fix=f'write "{close}"' if close else "remove the key",
            slug="unknown-key",
        )

    def merged(self, over: Document) -> Document:
        """This document with `over` laid on top: mappings are merged key by key, everything else is replaced."""
        marks = dict(self.marks)
        data = _merge(self.data, over.data, (), marks)
        marks.update({path: mark for path, mark in over.marks.items() if path})
        return Document(data, marks, over.source, self.files | over.files)

    def replaced(self, path: Path, value: Any, mark: str) -> Document:
        """A copy in which the value at `path` is another one; the way to it must exist, its last key may be new."""
        marks = {p: m for p, m in self.marks.items() if p[: len(path)] != path}
        marks[path] = mark
        return Document(_put(self.data, path, value), marks, self.source, self.files)


def _merge(base: Any, over: Any, path: Path, marks: dict[Path, str]) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = _merge(base[key], value, (*path, key), marks) if key in base else value
        return merged
    for stale in [p for p in marks if path and p[: len(path)] == path]:
        del marks[stale]
    return over


def _put(data: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    head, *tail = path
    if isinstance(data, list):
        return [_put(item, tuple(tail), value) if i == head else item for i, item in enumerate(data)]
    return {**data, head: _put(data.get(head), tuple(tail), value)}


def from_data(data: Any, source: str) -> Document:
    """A document from Python values; tuples become lists, anything that YAML could not hold is refused."""
    return Document(_plain(data, (), source), {(): source}, source)


def _plain(value: Any, path: Path, source: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _not_text(key, f"{source}, {dotted(path)}" if path else source)
        return {key: _plain(item, (*path, key), source) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, i), source) for i, item in enumerate(value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise PolicyError(
        "a value is of a type that a policy can't hold",
        where=f"{source}, {dotted(path)}",
        got=type(value).__name__,
        want="text, a number, true, false, a list or a mapping",
        fix="convert the value first",
        slug="wrong-type",
    )


def _not_text(key: object, where: str) -> PolicyError:
    return PolicyError(
        "a key is not text",
        where=where,
        got=repr(key),
        want="text",
        fix="write a key of the policy language; YAML reads bare yes, no, on and off as true and false",
        slug="bad-key",
    )


def from_yaml(text: str, source: str) -> Document:
    """Reads one YAML document.

    Raises:
        PolicyError: not YAML, empty, several documents, duplicate keys, tags, anchors, or nested too deep.
    """
    try:
        _screen(text, source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _not_yaml(error, source) from None
    if node is None:
        raise PolicyError(
            "the policy is empty",
            where=source,
            got="no content",
            want="a mapping with `version` and `steps`",
            fix="start from a preset: tvc policies show fastv",
            slug="empty",
        )
    marks: dict[Path, str] = {}
    data = _read(node, (), source, marks)
    marks[()] = source
    return Document(data, marks, source)


def _line(mark: Any) -> int:
    return int(mark.line) + 1


def _not_yaml(error: yaml.YAMLError, source: str) -> PolicyError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', None)}, {problem}"
    return PolicyError(
        "the policy is not YAML",
        where=f"{source}:{_line(mark)}" if mark else source,
        got=problem,
        want="one YAML document",
        fix="correct the text at that line; quote text that holds any of : { } [ ] , # & * ! |",
        slug="not-yaml",
    )


def _screen(text: str, source: str) -> None:
    """Refuses tags, anchors and deep nesting from the event stream, before any node is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{source}:{_line(event.start_mark)}"
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise PolicyError(
                "the policy is nested too deep",
                where=where,
                got=f"more than {MAX_DEPTH} levels",
                want=f"at most {MAX_DEPTH} levels",
                fix="flatten the policy",
                slug="too-deep",
            )
        if isinstance(event, yaml.AliasEvent) or anchor:
            raise PolicyError(
                "the policy uses a YAML anchor",
                where=where,
                got=anchor,
                want="plain values",
                fix="write the value out, or name it under `parameters` and refer to it as {name}",
                slug="yaml-anchor",
            )
        if tag:
            raise PolicyError(
                "the policy uses a YAML tag; a policy is data and never builds objects",
                where=where,
                got=tag,
                want="plain values",
                fix="remove the tag",
                slug="yaml-tag",
            )


def _read(node: yaml.Node, path: Path, source: str, marks: dict[Path, str]) -> Any:
    marks.setdefault(path, f"{source}:{_line(node.start_mark)}")
    if isinstance(node, yaml.MappingNode):
        return {key: _read(value, (*path, key), source, marks) for key, value in _entries(node, path, source, marks)}
    if isinstance(node, yaml.SequenceNode):
        return [_read(item, (*path, i), source, marks) for i, item in enumerate(node.value)]
    return scalar(node, source)


def _entries(
    node: yaml.MappingNode, path: Path, source: str, marks: dict[Path, str]
) -> Iterator[tuple[str, yaml.Node]]:
    seen: set[str] = set()
    for key, value in node.value:
        mark = f"{source}:{_line(key.start_mark)}"
        if not isinstance(key, yaml.ScalarNode) or key.tag in _SCALARS:
            raise _not_text(getattr(key, "value", "a collection"), mark)
        if key.value in seen:
            raise PolicyError(
                "a key is written twice",
                where=f"{mark}, {dotted((*path, key.value))}",
                got=key.value,
                want="each key once",
                fix="remove one of the two",
                slug="duplicate-key",
            )
        seen.add(key.value)
        marks[(*path, key.value)] = mark
        yield key.value, value


def scalar(node: yaml.Node, source: str) -> Any:
    """The number, truth value, nothing or text that a scalar node stands for (a date stays text)."""
    if node.tag not in _SCALARS:
        return node.value
    try:
        return yaml.SafeLoader("").construct_object(node)  # type: ignore[no-untyped-call]
    except ValueError:
        raise PolicyError(
            "a number can't be read",
            where=f"{source}:{_line(node.start_mark)}",
            got=f"{node.value[:40]}...",
            want="a number of ordinary size",
            fix="write a smaller number",
            slug="bad-number",
        ) from None
