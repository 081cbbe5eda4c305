"""load_policy: a preset's name, a path, a mapping or YAML text -> Policy; `extends` and settings on the way."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

# Imported here and not when first read: an import of the folder later on would put it in the place of the function
# `tvc.policy.presets`.
import tvc.policy.presets as preset_files
from tvc.errors import PolicyError
from tvc.kernels.op import PRIMITIVES
from tvc.policy.document import Document, Path, dotted, from_data, from_yaml, nearest
from tvc.policy.parameters import used_parameters
from tvc.policy.parse import TEMPLATED, TOP_KEYS, parse
from tvc.policy.published import without
from tvc.policy.schema import Policy

PolicySource = str | os.PathLike[str] | Mapping[str, Any] | Policy
_SUFFIXES = (".yaml", ".yml", ".json")
_MAX_EXTENDS = 8


@functools.cache
def presets() -> tuple[str, ...]:
    """The names of the policies that ship with `tvc`, sorted."""
    folder = resources.files(preset_files)
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_policy(source: PolicySource, set: Iterable[str] | Mapping[str, Any] = ()) -> Policy:  # noqa: A002
    """A policy, checked as far as that is possible without a model.

    Args:
        source: the name of a preset, a path, YAML text, a mapping, or a `Policy`.
        set: values that replace some of the policy's: `"before_layer=3"` for a parameter, or
            `"steps.0.select.top.keep=25%"` for any place; or a mapping from such keys to values.

    Raises:
        PolicyError: where the policy or a setting is wrong: file, line, what was found, what is legal, what to write.
    """
    document = source.document if isinstance(source, Policy) else _flatten(_read(source), ())
    settings = _settings(set)
    if settings:
        parse(document)  # so that a mistake in the policy is not reported as one in the setting
        document = _apply(document, settings)
    return parse(document)


# Sources --------------------------------------------------------------------------------------------------------------


def _read(source: str | os.PathLike[str] | Mapping[str, Any], beside: pathlib.Path | None = None) -> Document:
    if isinstance(source, Mapping):
        return from_data(source, "policy")
    if not isinstance(source, (str, os.PathLike)):
        raise PolicyError(
            "a policy can't be read from a value of this type",
            where="load_policy",
            got=type(source).__name__,
            want="a preset's name, a path, a mapping or YAML text",
            fix='load_policy("fastv")',
            slug="wrong-type",
        )
    text = os.fspath(source)
    if isinstance(source, str):
        if source in presets():
            content = resources.files(preset_files).joinpath(f"{source}.yaml").read_text("utf-8")
            return from_yaml(content, f"preset {source}")
        if not source.strip() or "\n" in source or ": " in source or source.lstrip().startswith("{"):
            return from_yaml(source, "policy text")
        if not (source.endswith(_SUFFIXES) or os.sep in source or pathlib.Path(source).is_file()):
            raise _no_preset(source)
    return _read_file(text, (beside or pathlib.Path()) / text)


def _no_preset(name: str) -> PolicyError:
    close = nearest(name, presets())
    return PolicyError(
        "no preset has that name",
        where="policy",
        got=name,
        want=f"one of {', '.join(presets())}, or a path that ends in .yaml",
        fix=f'write "{close}"' if close else "tvc policies list",
        slug="unknown-preset",
    )


def _read_file(shown: str, path: pathlib.Path) -> Document:
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError:
        problem, fix = "is not UTF-8 text", "save the file as UTF-8"
    except IsADirectoryError:
        problem, fix = "is a directory", "name the policy's file"
    except FileNotFoundError:
        problem, fix = "does not exist", "correct the path, or name a preset: tvc policies list"
    except OSError as error:
        problem, fix = f"can't be read: {error.strerror}", "check the path and its permissions"
    else:
        return dataclasses.replace(from_yaml(content, shown), files=frozenset({shown}))
    raise PolicyError(
        "the policy's file can't be read",
        where=shown,
        got=f"{shown} {problem}",
        want="a YAML file",
        fix=fix,
        slug="unreadable-file",
    )


def _flatten(document: Document, chain: tuple[str, ...]) -> Document:
    """The document with what it `extends` laid underneath it, all the way down."""
    data = document.data
    if not isinstance(data, dict) or "extends" not in data:
        return document
    base_name = data["extends"]
    if not isinstance(base_name, str) or not (base_name in presets() or base_name.endswith(_SUFFIXES)):
        close = nearest(base_name, presets()) if isinstance(base_name, str) else None
        raise document.error(
            ("extends",),
            "the policy extends one that does not exist",
            got=base_name,
            want=f"one of {', '.join(presets())}, or a path that ends in .yaml",
            fix=f'write "{close}"' if close else "name a preset: tvc policies list",
            slug="unknown-preset",
        )
    beside = pathlib.Path(document.source).parent
    shown = base_name if base_name in presets() else os.fspath(beside / base_name)
    if shown in chain or len(chain) >= _MAX_EXTENDS:
        raise document.error(
            ("extends",),
            "policies extend each other in a circle or too deep",
            got=" > ".join((*chain, shown)),
            want=f"a chain of at most {_MAX_EXTENDS} policies",
            fix="remove one `extends`",
            slug="extends-circle",
        )
    base = _flatten(_read(shown), (*chain, shown))
    over = {key: value for key, value in data.items() if key != "extends"}
    if isinstance(base.data, dict) and "name" in base.data and "name" not in over:
        over["name"] = f"{base.data['name']}-variant"
    merged = base.merged(dataclasses.replace(document, data=over))
    return _without_unused(merged, spare=over.get("parameters", {}))


def _without_unused(document: Document, spare: Any) -> Document:
    """The document less the parameters that its steps, having been replaced, no longer use, and less the budgets that
    set them; those in `spare` stay.
    """
    data = document.data
    if not isinstance(data, dict) or not isinstance(data.get("parameters"), dict) or not isinstance(spare, Mapping):
        return document
    used = used_parameters([data.get(key) for key in TEMPLATED])
    kept = {name: value for name, value in data["parameters"].items() if name in used or name in spare}
    trimmed = {**data, "parameters": kept} if kept else {k: v for k, v in data.items() if k != "parameters"}
    if len(kept) < len(data["parameters"]):
        trimmed = without(trimmed, kept)
    return dataclasses.replace(document, data=trimmed)


# Settings -------------------------------------------------------------------------------------------------------------


def _settings(given: Iterable[str] | Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(key, value, how it was written) of each setting; text after `=` is read as YAML."""
    if isinstance(given, Mapping):
        return [
            (key, from_data({"value": v}, f"setting {key}").data["value"], f"setting {key}") for key, v in given.items()
        ]
    if isinstance(given, str):
        given = [given]
    settings = []
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise PolicyError(
                "a setting is not of the form KEY=VALUE",
                where=f"--set {text}",
                got=text,
                want="KEY=VALUE",
                fix="write --set before_layer=3",
                slug="bad-setting",
            )
        settings.append((key.strip(), from_yaml(value, f"--set {text}").data, f"--set {text}"))
    return settings


def _apply(document: Document, settings: list[tuple[str, Any, str]]) -> Document:
    touched = []
    for key, value, mark in settings:
        document = _spelled_out(document, _parts(key))
        path = _target(document, key, mark)
        touched += [path[1]] if path[0] == "parameters" else []
        document = document.replaced(path, value, mark)
    return _without_unused(document, spare=dict.fromkeys(touched))


def _parts(key: str) -> Path:
    return tuple(int(p) if p.isdigit() else p for p in key.replace("[", ".").replace("]", "").split("."))


def _spelled_out(document: Document, path: Path) -> Document:
    """The document in which the primitive that a path goes into has its settings as a mapping: `{top: 25%}` and a name
    alone have no place for `steps.0.select.top.keep`.
    """
    for depth in range(3, min(5, len(path))):
        kind = next((part for part in reversed(path[:depth]) if part in PRIMITIVES), None)
        known = PRIMITIVES.get(kind, {})  # type: ignore[arg-type]
        here = _found(document.data, path[:depth])
        if here == path[depth] and here in known:
            document = document.replaced(path[:depth], {here: {}}, document.mark(path[:depth]))
        elif path[depth - 1] in known and not isinstance(here, (dict, list)) and here is not None:
            shorthand = known[str(path[depth - 1])].shorthand
            if shorthand:
                document = document.replaced(path[:depth], {shorthand: here}, document.mark(path[:depth]))
    return document


def _found(data: Any, path: Path) -> Any:
    """What lies at a path, or None."""
    for part in path:
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif isinstance(data, dict):
            data = data.get(part)
        else:
            return None
    return data


def _target(document: Document, key: str, mark: str) -> Path:
    """The path that the key of a setting means; all of it but its last key must be there already."""
    parts = _parts(key)
    parameters = document.data.get("parameters", {})
    if len(parts) == 1 and parts[0] in parameters:
        return ("parameters", parts[0])
    if parts[0] not in TOP_KEYS or parts[0] in ("extends", "version"):
        known = [*parameters, *TEMPLATED, "name", "about"]
        close = nearest(str(parts[0]), known)
        raise PolicyError(
            "a setting names neither a parameter nor a place in the policy",
            where=mark,
            got=key,
            want=f"one of {', '.join([*parameters, 'steps.0.<key>', 'positions'])}",
            fix=f'write "{close}"' if close else "tvc policies show NAME lists the parameters",
            slug="unknown-parameter",
        )
    here: Any = document.data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif isinstance(here, dict) and isinstance(part, str) and (part in here or (last and parts[0] != "parameters")):
            here = here.get(part)
        else:
            raise _no_place(mark, parts[:depth], part, here)
    return parts


def _no_place(mark: str, path: Path, part: str | int, here: Any) -> PolicyError:
    known = [str(k) for k in here] if isinstance(here, dict) else []
    if isinstance(here, list):
        known = [f"0..{len(here) - 1}"]
    close = nearest(str(part), known)
    fix = f'write "{close}"' if close else f"set {dotted(path)} as a whole: --set '{dotted(path)}=...'"
    if isinstance(here, list):
        fix = f"write {dotted(path)}.0 for the first"
    return PolicyError(
        "a setting names a place that the policy does not have",
        where=mark,
        got=dotted((*path, part)),
        want=f"one of {', '.join(known)} under {dotted(path)}"
        if known
        else f"{dotted(path)} is the single value {here}",
        fix=fix,
        slug="unknown-setting",
    )
