"""The artifact directory: `tvc.json` beside the files it names, all or nothing.

Writing happens in a temporary sibling (`.<name>.partial-<pid>-<random>`), which is renamed when everything,
`tvc.json` last, is on disk. A compile that is killed leaves that sibling at most; the next compile to the same place
removes siblings whose process is gone. Reading trusts nothing: the format version is known, every listed path stays
in the directory, every listed file is there with the length and the digest that were noted. Files that are not listed
are none of its business.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tvc.errors import ArgumentError, ArtifactError
from tvc.export.base import interface
from tvc.program import Program

FILE = "tvc.json"
FORMAT = 1
_LIBRARIES = ("tvc", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "safetensors")
_SECTIONS: dict[str, type] = {"target": str, "components": dict, "stages": list, "files": dict}


def digest(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """The installed versions of the libraries that an artifact depends on."""
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def describe(
    program: Program, target: str, *, model: Mapping[str, Any], policy: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The content of `tvc.json` except the file table.

    Args:
        program: What was compiled.
        target: The target's name.
        model: Source of the weights: `{"source": ..., "revision": ...}` and whatever else identifies them.
        policy: The resolved policy, as plain data.
        more: Further sections; their names must not be those of this module.
    """
    stages = [{"index": s.index, "layers": [s.layers.start, s.layers.stop], "site": s.site} for s in program.stages]
    fusions = {name: part.meta["fusions"] for name, part in program.components.items() if "fusions" in part.meta}
    plain = {"model": dict(model), "policy": dict(policy), "versions": versions(), "fusions": fusions}
    return {"format": FORMAT, "target": target, **plain, "stages": stages, "components": interface(program), **more}


def _partial(place: Path) -> str:
    return f".{place.name}.partial-"


def clean(place: Path) -> list[Path]:
    """Removes what killed compiles to `place` left beside it; returns what was removed."""
    removed = []
    prefix = _partial(place)
    for path in place.parent.glob(f"{prefix}*"):
        pid = path.name.removeprefix(prefix).split("-")[0]
        if path.is_dir() and not path.is_symlink() and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path)
            removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes": ..., "sha256": ...}}` of every file below `folder` except the manifest itself."""
    table = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != FILE:
            table[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    return table


@contextlib.contextmanager
def writing(
    place: Path | str, *, overwrite: bool = False
) -> Iterator[tuple[Path, Callable[[Mapping[str, Any]], None]]]:
    """A folder to write an artifact into, which becomes `place` when the block ends without an error.

    Yields:
        (folder, seal): write files into `folder`, then call `seal(description)` once; the block fails without it.

    Raises:
        ArgumentError: `place` exists and is no artifact, or is one and `overwrite` is false.
    """
    place = Path(os.path.abspath(place))
    check_place(place, overwrite)
    place.parent.mkdir(parents=True, exist_ok=True)
    clean(place)
    folder = place.parent / f"{_partial(place)}{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()

    def seal(description: Mapping[str, Any]) -> None:
        text = json.dumps({**description, "files": files(folder)}, indent=1, sort_keys=False)
        with (folder / FILE).open("w", encoding="utf-8") as stream:
            stream.write(text + "\n")

    try:
        yield folder, seal
        if not (folder / FILE).is_file():
            raise ArtifactError(
                "the artifact was never sealed",
                where=str(place),
                got="files without a manifest",
                want="a call of seal",
                fix="call seal(description) at the end of the block",
            )
        _flush(folder)
        _move(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_place(place: Path, overwrite: bool) -> None:
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    artifact = (place / FILE).is_file()
    if not artifact or not overwrite:
        raise ArgumentError(
            "the output directory is in use",
            where=str(place),
            got="an artifact" if artifact else "files that are no artifact",
            want="a path that does not exist or an empty directory",
            fix="choose another directory, or ask to overwrite" if artifact else "choose another directory",
            slug="output-exists",
        )


def _flush(folder: Path) -> None:
    """Everything reaches the disk before the name does."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _move(folder: Path, place: Path) -> None:
    """`folder` becomes `place`; an older artifact there steps aside first and is removed afterwards."""
    if not place.exists():
        folder.rename(place)
        return
    aside = place.parent / f"{_partial(place)}{os.getpid()}-old-{secrets.token_hex(4)}"
    place.rename(aside)
    folder.rename(place)
    shutil.rmtree(aside)


def read(place: Path | str, *, only: Iterable[str] | None = None) -> dict[str, Any]:
    """The checked content of an artifact's `tvc.json`.

    Args:
        place: The artifact directory.
        only: Check the digests of these files alone (all are looked for and measured); None: of all of them.

    Raises:
        ArtifactError: Not an artifact, of another format version, or incomplete, changed or unsafe; it names the file.
    """
    place = Path(place)
    content = _parse(place / FILE)
    for section, kind in _SECTIONS.items():
        if not isinstance(content.get(section), kind):
            raise _bad(
                "the manifest lacks a section or holds another type there",
                place / FILE,
                f"{section}: {content.get(section)!r:.60}",
                f"{section} as a {kind.__name__}",
            )
    checked = None if only is None else set(only)
    for name, entry in content["files"].items():
        path = _inside(place, name)
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("bytes"), int)
            or not isinstance(entry.get("sha256"), str)
        ):
            raise _bad(
                "the manifest describes a file without its length and digest",
                place / FILE,
                f"{name}: {entry!r:.60}",
                "bytes and sha256",
            )
        if not path.is_file():
            raise _bad(
                "a file of the artifact is missing",
                path,
                "no such file",
                f"{entry['bytes']} bytes",
                slug="missing-file",
            )
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise _bad(
                "a file of the artifact has another length",
                path,
                f"{size} bytes",
                f"{entry['bytes']} bytes",
                slug="truncated-file" if size < entry["bytes"] else "changed-file",
            )
        if (checked is None or name in checked) and (found := digest(path)) != entry["sha256"]:
            raise _bad(
                "a file of the artifact was changed",
                path,
                f"sha256 {found[:16]}",
                f"sha256 {entry['sha256'][:16]}",
                slug="changed-file",
            )
    return content


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _bad(
            "this is not an artifact",
            path,
            "no such file",
            f"a directory with {FILE}",
            fix="give the directory that a compile wrote",
            slug="not-an-artifact",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _bad("the manifest is not JSON", path, str(error), "JSON in UTF-8", slug="truncated-file") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise _bad(
            "the artifact has another format",
            path,
            f"format {version}",
            f"format {FORMAT}",
            fix="compile the model again with this version",
            slug="unknown-format",
        )
    return content


def _inside(place: Path, name: str) -> Path:
    """The path of a listed file, which must be an ordinary path below `place`, symbolic links followed."""
    parts, windows = PurePosixPath(name), PureWindowsPath(name)
    plain = (
        not parts.is_absolute()
        and not windows.is_absolute()
        and not windows.drive
        and ".." not in (*parts.parts, *windows.parts)
        and parts.parts
        and "\0" not in name
    )
    path = place / name
    if (
        plain
        and path.resolve().is_relative_to(place.resolve())
        and not (path.exists() and not stat.S_ISREG(path.stat().st_mode))
    ):
        return path
    raise _bad(
        "the manifest names a path that leaves the directory",
        place / FILE,
        repr(name),
        "relative paths of files below the artifact",
        fix="do not open this artifact",
        slug="unsafe-path",
    )


def _bad(
    summary: str,
    path: Path,
    got: object,
    want: object,
    *,
    fix: str = "compile the model again, or copy the artifact again from where it came",
    slug: str | None = None,
) -> ArtifactError:
    return ArtifactError(summary, where=str(path), got=got, want=want, fix=fix, slug=slug)
