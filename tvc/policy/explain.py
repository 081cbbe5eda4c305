"""What pydantic says of a primitive's settings, in the five lines and in plain words."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tvc.errors import PolicyError
from tvc.kernels.op import Primitive
from tvc.policy.document import Document, Path, dotted, nearest

_WANTS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "nothing",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
}


def build(cls: type[Primitive], document: Document, path: Path, settings: Any) -> Primitive:
    """The primitive with these settings: a mapping, or the bare value of its shorthand.

    Raises:
        PolicyError: naming the setting, its line, what it may be and what to write.
    """
    bare = not isinstance(settings, dict) and cls.shorthand is not None
    mapping = {cls.shorthand: settings} if bare else settings
    try:
        return cls.model_validate(mapping)
    except ValidationError as refused:
        errors = refused.errors(include_url=False)
    raise _translated(cls, document, path, mapping, errors, bare)


def _inside(settings: Any, location: tuple[int | str, ...]) -> Path:
    """The part of a pydantic location that is in the data: it also names the members of unions, which are not."""
    path: list[int | str] = []
    for part in location:
        keyed = isinstance(settings, dict) and part in settings
        if keyed or (isinstance(settings, list) and isinstance(part, int) and part < len(settings)):
            settings = settings[part]
            path.append(part)
    return tuple(path)


def _best(settings: Any, errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """The errors of the member of a union that the writer most likely meant; all of them where none stands out.

    A member that got inside the value and only then failed was meant; one that lacks its key, or knows none of the
    value's, is the next best guess; one that wanted another kind of value altogether says least.
    """
    members: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    shallow = min(len(_inside(settings, e["loc"])) for e in errors)
    for error in errors:
        inside, here = _inside(settings, error["loc"]), error["loc"]
        tag = next((here[: i + 1] for i in range(len(here)) if i >= len(inside) or here[i] != inside[i]), here)
        members.setdefault(tag, []).append(error)

    def rank(group: list[ErrorDetails]) -> int:
        if any(e["type"] in ("missing", "extra_forbidden") for e in group):
            return 1
        return 0 if any(len(_inside(settings, e["loc"])) > shallow for e in group) else 2

    best = min(rank(group) for group in members.values())
    chosen = [e for group in members.values() if rank(group) == best for e in group]
    return sorted(chosen, key=lambda e: e["type"] != "extra_forbidden")


def _translated(
    cls: type[Primitive], document: Document, path: Path, settings: Any, errors: list[ErrorDetails], bare: bool
) -> PolicyError:
    """The refusal; `bare` says that the text holds the value alone, without the name of its setting."""
    errors = _best(settings, errors)
    first = errors[0]
    here = _inside(settings, first["loc"])
    where, slug, key = (*path, *here[bare:]), first["type"], cls.key
    context = first.get("ctx", {})
    if "fix" in context:
        return document.error(
            where, context["summary"], got=context["got"], want=context["want"], fix=context["fix"], slug=slug
        )
    lacking = list(dict.fromkeys(str(e["loc"][-1]) for e in errors if e["type"] == "missing"))
    if slug == "extra_forbidden":
        inner = len(here) > 1
        return document.unknown(where, str(first["loc"][-1]), lacking if inner else cls.model_fields, f"`{key}`")
    if slug == "missing":
        return document.error(
            where,
            f"`{key}` lacks a setting that it needs",
            got=", ".join(settings) or "no settings",
            want=" or ".join(lacking),
            fix=f"add {lacking[0]}: ... under {here[-1] if here else key}",
            slug="missing-key",
        )
    # A union reports one error per member, all at one place: together they say what is legal.
    wants = dict.fromkeys(_want(e) for e in errors if _inside(settings, e["loc"]) == here)
    got = first["input"]
    if slug == "value_error":
        rule = str(context.get("error", first["msg"]))
        return document.error(
            where,
            f"`{key}` has settings that do not go together",
            got=", ".join(settings) or "no settings",
            want=rule,
            fix=f"{rule} under {key}",
            slug="bad-value",
        )
    name = dotted(here) if here else key
    choices = [word.strip("'") for e in errors for word in str(e.get("ctx", {}).get("expected", "")).split(" or ")]
    choices = [word.strip("' ") for choice in choices for word in choice.split(",") if word.strip("' ")]
    close = nearest(str(got), choices)
    return document.error(
        where,
        f"`{name}` has a value that it can't have",
        got=got,
        want=" or ".join(wants),
        fix=f'write "{close}"' if close else f"write {next(iter(wants))}",
        slug="bad-value" if choices else "wrong-type",
    )


def _want(error: ErrorDetails) -> str:
    """What the member of the union that reported `error` would have taken."""
    context, kind = error.get("ctx", {}), error["type"]
    if "want" in context:
        return str(context["want"])
    if "expected" in context:
        return "one of " + str(context["expected"]).replace("'", "").replace(" or ", ", ")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]:g}"
    return _WANTS.get(kind, error["msg"][:1].lower() + error["msg"][1:])
