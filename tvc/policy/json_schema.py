"""The JSON Schema of the policy language, put together from the registered primitives, for editors."""

from __future__ import annotations

from typing import Any

from tvc.kernels.op import PRIMITIVES, Kind, Primitive
from tvc.policy.bypass import NEVER, NEXT
from tvc.policy.evictions import EARLIER
from tvc.policy.options import OPTIONS, options_schema
from tvc.policy.positions import positions_schema
from tvc.policy.reselection import Reselect
from tvc.policy.schema import MEASURES, NORMALIZE, SCOPES, SITE_PATTERN, SPAN_PATTERN, VERSION

_TEMPLATE = {"type": "string", "pattern": r"^\{[A-Za-z_][A-Za-z0-9_]*\}$", "description": "a parameter's value"}


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of one policy file; each primitive's settings are its own pydantic schema."""
    definitions: dict[str, Any] = {"template": _TEMPLATE}
    choices = {kind: _choices(kind, definitions) for kind in PRIMITIVES}
    term = {"weight": {"type": "number", "default": 1}, "normalize": {"enum": list(NORMALIZE), "default": "none"}}
    definitions["scores"] = _scores(choices["score"], term)
    definitions["reselect"] = _fields(Reselect, definitions)
    definitions["step"] = _step(choices)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tvc policy",
        "type": "object",
        "additionalProperties": False,
        "required": ["version"],
        "anyOf": [
            {"required": ["steps"]},
            {"required": ["extends"]},
            {"required": ["positions"], "properties": {"positions": {"type": "object"}}},
            {"required": ["reselect"]},
            *({"required": [place]} for place in OPTIONS),
        ],
        "properties": {
            "version": {"const": VERSION},
            "name": {"type": "string"},
            "about": {"type": "string"},
            "reference": {"type": "object"},
            "covers": {"type": "string"},
            "deviations": {"type": "array", "items": {"type": "string"}},
            "unverified": {"type": "array", "items": {"type": "string"}},
            "extends": {"type": "string"},
            "parameters": {"type": "object"},
            "budgets": {
                "type": "object",
                "propertyNames": {"pattern": r"^\d+(\.\d)?%$"},
                "additionalProperties": {"type": "object"},
                "description": "parameters by the share of the visual tokens that they are published for",
            },
            "measure": {
                "enum": list(MEASURES),
                "default": "last",
                "description": "a budget is what the last cut leaves, or the mean over the decoder's layers",
            },
            "steps": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}},
            "positions": {"anyOf": [*positions_schema(), {"$ref": "#/$defs/template"}], "default": "keep"},
            "reselect": {"$ref": "#/$defs/reselect"},
            **options_schema({"$ref": "#/$defs/template"}),
        },
        "$defs": definitions,
    }


def _step(choices: dict[Kind, dict[str, Any]]) -> dict[str, Any]:
    """The schema of one step; `choices` are those of each kind of primitive."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["at"],
        "oneOf": [{"required": ["select"]}, {"required": ["merge"]}, {"required": ["exit"]}],
        "properties": {
            "name": {"type": "string"},
            "at": {
                "anyOf": [
                    {"type": "string", "pattern": f"^({SITE_PATTERN}|{SPAN_PATTERN})$"},
                    {"type": "string", "pattern": r"\{[A-Za-z_][A-Za-z0-9_]*\}"},
                ],
                "description": "vision.K, projector or language.K: before that block runs, 0-based, -1 the last; "
                "vision.1..-2 or vision.all: a step before each of these blocks; language.1..25/2: every other one",
            },
            "scope": {"enum": list(SCOPES), "default": "image"},
            "score": {"$ref": "#/$defs/scores"},
            "select": _one_of(choices["select"]),
            "rest": {**_one_of(choices["rest"]), "default": "drop"},
            "merge": _one_of(choices["merge"]),
            "exit": {
                "type": "object",
                "additionalProperties": False,
                "required": ["when"],
                "properties": {"when": _gate(choices["when"])},
            },
            "evict": {
                "anyOf": [
                    {"const": EARLIER},
                    {"type": "string", "pattern": f"^(?:{SITE_PATTERN})$"},
                    {"type": "string", "pattern": r"\{[A-Za-z_][A-Za-z0-9_]*\}"},
                ],
                "description": "once the chunk has been read, what the step drops leaves caches of earlier layers, "
                "too: of all, or of those from language.K on; default: it stays there",
            },
            "until": {
                "anyOf": [
                    {"enum": [NEXT, NEVER]},
                    {"type": "string", "pattern": f"^(?:{SITE_PATTERN})$"},
                    {"type": "string", "pattern": r"\{[A-Za-z_][A-Za-z0-9_]*\}"},
                ],
                "description": "what the step drops passes by the layers in front of this one, language.K or the next, "
                "and takes part again from it on, as it was; default: never",
            },
        },
    }


def _choices(kind: Kind, definitions: dict[str, Any]) -> dict[str, Any]:
    """For each primitive of a kind, the schema of what may follow its name; its own definitions go to `definitions`."""
    found = {}
    for key, cls in sorted(PRIMITIVES[kind].items()):
        schema = definitions[f"{kind}.{key}"] = _fields(cls, definitions)
        found[key] = _settings(cls, f"#/$defs/{kind}.{key}", schema)
    return found


def _fields(cls: type[Primitive], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a primitive's settings, each of which may be a parameter."""
    schema = cls.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(schema.pop("$defs", {}))
    schema["properties"] = {
        name: {"anyOf": [field, {"$ref": "#/$defs/template"}]} | _annotations(field)
        for name, field in schema.get("properties", {}).items()
    }
    return schema


def _annotations(field: dict[str, Any]) -> dict[str, Any]:
    return {key: field.pop(key) for key in ("description", "default", "title") if key in field}


def _settings(cls: type[Primitive], reference: str, schema: dict[str, Any]) -> dict[str, Any]:
    options: list[dict[str, Any]] = [{"$ref": reference}]
    if cls.shorthand is not None:
        options.append(schema["properties"][cls.shorthand])
    if not schema.get("required"):
        options.append({"type": "null"})
    return {"anyOf": options}


def _one_of(choices: dict[str, Any]) -> dict[str, Any]:
    """`{name: settings}` with exactly one name, or a name alone."""
    mapping = {"type": "object", "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"enum": sorted(choices)}, {**mapping, "properties": choices}]}


def _scores(choices: dict[str, Any], term: dict[str, Any]) -> dict[str, Any]:
    weighted = {
        "type": "object",
        "additionalProperties": False,
        "properties": {**choices, **term},
        "oneOf": [{"required": [key]} for key in choices],
    }
    one = {"anyOf": [{"enum": sorted(choices)}, weighted]}
    return {"anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}


def _gate(choices: dict[str, Any]) -> dict[str, Any]:
    compared = {
        "type": "object",
        "required": ["score"],
        "additionalProperties": False,
        "properties": {
            "score": {"$ref": "#/$defs/scores"},
            "reduce": {"enum": ["max", "mean", "sum"], "default": "max"},
            "above": {"type": "number"},
            "below": {"type": "number"},
        },
        "oneOf": [{"required": ["above"]}, {"required": ["below"]}],
    }
    unscored = {key: settings for key, settings in choices.items() if key != "threshold"}
    return {"anyOf": [*_one_of(unscored)["anyOf"], compared]}
