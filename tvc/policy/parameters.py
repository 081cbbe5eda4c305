"""Parameters of a policy: `{name}` in a document is replaced by what stands under `parameters`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tvc.policy.document import Document, Path, nearest

_TEMPLATE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def filled(
    document: Document, parameters: Mapping[str, Any], places: Sequence[str], reserved: Collection[str]
) -> Document:
    """The document with `{name}` below the keys `places` replaced by the parameter's value.

    Raises:
        PolicyError: a name that is one of `reserved`, a parameter that is used nowhere, or one that there is not.
    """
    for name, value in parameters.items():
        if not name.isidentifier() or name in reserved:
            raise document.error(
                ("parameters", name),
                "a parameter has a name that can't be referred to",
                got=name,
                want="letters, digits and _, none of the policy's own keys",
                fix="rename the parameter",
                slug="bad-parameter",
            )
        if isinstance(value, str) and _TEMPLATE.search(value):
            raise document.error(
                ("parameters", name),
                "a parameter refers to a parameter",
                got=value,
                want="a plain value",
                fix="write the value out",
                slug="bad-parameter",
            )
    used: set[str] = set()
    data, marks = dict(document.data), dict(document.marks)
    for key in places:
        if key in data:
            here = dataclasses.replace(document, data=data, marks=marks)
            data[key] = _expand(here, (key,), data[key], parameters, used, marks)
    for name in parameters:
        if name not in used:
            close = nearest(name, [p for p in parameters if p in used])
            raise document.error(
                ("parameters", name),
                "a parameter is used nowhere in the steps",
                got=name,
                want=f"one of {', '.join(sorted(used))}" if used else "no parameters",
                fix=f'write "{close}"' if close else f'refer to it as "{{{name}}}" in a step, or remove it',
                slug="unused-parameter",
            )
    return dataclasses.replace(document, data=data, marks=marks)


def used_parameters(data: Any) -> set[str]:
    """The names of all templates in a value."""
    if isinstance(data, dict):
        return {name for item in data.values() for name in used_parameters(item)}
    if isinstance(data, list):
        return {name for item in data for name in used_parameters(item)}
    return set(_TEMPLATE.findall(data)) if isinstance(data, str) else set()


def _expand(
    document: Document, path: Path, value: Any, parameters: Mapping[str, Any], used: set[str], marks: dict[Path, str]
) -> Any:
    """The value with its templates replaced; one that is nothing but a template is marked with the parameter's line."""
    if isinstance(value, dict):
        for key in value:
            if len(value) == 1 and value[key] is None and key in parameters:
                raise document.error(
                    path,
                    "a reference to a parameter stands without quotes, which YAML reads as a mapping",
                    got=f"{{{key}}}",
                    want=f'"{{{key}}}"',
                    fix=f'write "{{{key}}}", quotes included',
                    slug="unquoted-parameter",
                )
        return {key: _expand(document, (*path, key), item, parameters, used, marks) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(document, (*path, i), item, parameters, used, marks) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in _TEMPLATE.findall(value):
        if name not in parameters:
            close = nearest(name, parameters)
            raise document.error(
                path,
                "a step refers to a parameter that the policy does not have",
                got=f"{{{name}}}",
                want=f"one of {', '.join(sorted(parameters))}" if parameters else "a name under `parameters`",
                fix=f'write "{{{close}}}"' if close else f"add {name} under parameters",
                slug="unknown-parameter",
            )
        used.add(name)
    whole = _TEMPLATE.fullmatch(value)
    if whole is None:
        return _TEMPLATE.sub(lambda m: str(parameters[m[1]]), value)
    marks[path] = marks.get(("parameters", whole[1]), document.source)
    return parameters[whole[1]]
