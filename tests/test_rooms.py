"""Who may import whom, as ARCHITECTURE.md says; and the limits on the length of files and functions."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
TOP_LEVEL = ("export", "kernels", "passes")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tvc", *TOP_LEVEL)
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


@dataclasses.dataclass(frozen=True)
class Room:
    name: str
    where: tuple[str, ...]
    may_import: frozenset[str]
    libraries: frozenset[str]

    def holds(self, file: str) -> bool:
        """`tvc/*.py` means the files right in that folder; a path that ends in `/` means everything below."""
        return any(
            file.startswith(place)
            if place.endswith("/")
            else pathlib.PurePosixPath(file).match(place) and file.count("/") == place.count("/")
            for place in self.where
        )


def _items(cell: str) -> list[str]:
    return [item.strip().strip("`") for item in cell.split(",") if item.strip()]


def _rooms() -> dict[str, Room]:
    table = PAGE.split("## Rooms")[1].split("\n## ")[0]
    lines = [line.strip("|") for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    return {
        name: Room(name, tuple(_items(where)), frozenset(_items(may)), frozenset(_items(own)))
        for name, where, may, own in rows
    }


ROOMS = _rooms()
MONOPOLIES = frozenset().union(*(room.libraries for room in ROOMS.values()))


def _room_of(file: str) -> Room:
    """The first room whose pattern fits, the one file before the folder, so that `tvc/*.py` is what is left."""
    fitting = [room for room in ROOMS.values() if room.holds(file)]
    exact = [room for room in fitting if file in room.where]
    return (exact or fitting)[0]


def _imports(file: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions included; relative imports are banned by ruff."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def _file_of(dotted: str) -> str:
    """The file that `tvc.a.b.Name` lives in."""
    parts = dotted.split(".")
    places = parts[1:] if parts[1:2] and parts[1] in TOP_LEVEL else parts
    for length in range(len(places), 0, -1):
        path = pathlib.PurePosixPath(*places[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if (ROOT / file).is_file():
                return file.as_posix()
    raise AssertionError(f"{dotted} lies nowhere")


def test_the_rooms_have_an_order() -> None:
    known: set[str] = set()
    for room in ROOMS.values():
        assert room.may_import <= known, f"{room.name} imports a room that comes later in the table"
        known.add(room.name)


@pytest.mark.parametrize("file", FILES)
def test_imports_stay_within_the_rooms(file: str) -> None:
    room, wrong = _room_of(file), []
    for line, dotted in _imports(file):
        library = dotted.split(".")[0]
        if library in MONOPOLIES - room.libraries:
            wrong.append(f"{file}:{line} imports {library}, which is not the {room.name} room's")
        if library in TOP_LEVEL:
            wrong.append(f"{file}:{line} imports {library} without the tvc. in front")
        if library == "tvc":
            other = _room_of(_file_of(dotted))
            if other.name not in room.may_import | {room.name}:
                wrong.append(f"{file}:{line} imports {dotted} of the {other.name} room")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_stay_short(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    excused = re.findall(r"^- `([^`]+)`: \S", PAGE.split("## Long files")[1], flags=re.MULTILINE)
    long = [
        f"{file}:{node.lineno} {node.name} has {(node.end_lineno or node.lineno) - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 80
    ]
    assert text.count("\n") <= 500 or file in excused, f"{file} has {text.count(chr(10))} lines; split it or excuse it"
    assert not long, "\n".join(long)


def test_excused_files_exist_and_are_long() -> None:
    for file in re.findall(r"^- `([^`]+)`: \S", PAGE.split("## Long files")[1], flags=re.MULTILINE):
        assert (ROOT / file).read_text(encoding="utf-8").count("\n") > 500, file


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {pathlib.PurePosixPath(file).parent for file in FILES}
    named = {".".join(folder.parts if folder.parts[0] == "tvc" else ("tvc", *folder.parts)) for folder in folders}
    assert set(listed) == named


def test_a_stray_import_is_found() -> None:
    assert _file_of("tvc.kernels.op.Primitive") == "kernels/op.py"
    assert _file_of("tvc.program.Program") == "tvc/program.py"
    assert _file_of("tvc.trace.processor.load_processor") == "tvc/trace/processor.py"
    assert _file_of("tvc.passes") == "passes/__init__.py"
    assert _file_of("tvc.compile") == "tvc/__init__.py"
    assert _room_of("tvc/program.py").name == "program"
    assert _room_of("tvc/compiler.py").name == "api"
    assert _room_of("tvc/trace/families/x.py").name == "trace"
    assert "api" not in ROOMS["trace"].may_import
