"""Document -> Policy: every check that needs no model, each refusal with its line, what is legal and what to write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from tvc.kernels.op import PRIMITIVES, Kind, Primitive
from tvc.kernels.weights import Trained, Weights
from tvc.policy.bypass import check_alone, check_beside
from tvc.policy.bypass import written as returns
from tvc.policy.document import Document, Path, nearest
from tvc.policy.evictions import written
from tvc.policy.explain import build
from tvc.policy.options import OPTIONS, read_options
from tvc.policy.order import behind
from tvc.policy.parameters import filled
from tvc.policy.positions import read_positions
from tvc.policy.published import published
from tvc.policy.reselection import read_reselect
from tvc.policy.schema import (
    COMPONENTS,
    MEASURES,
    NORMALIZE,
    SCOPES,
    VERSION,
    Exit,
    Policy,
    Step,
    WeightedScore,
    parse_site,
    parse_sites,
)

TOP_KEYS = (
    "version",
    "name",
    "about",
    "reference",
    "covers",
    "deviations",
    "unverified",
    "extends",
    "parameters",
    "budgets",
    "measure",
    "steps",
    "positions",
    "reselect",
    *OPTIONS,
)
TEMPLATED = ("steps", "positions", "reselect", *OPTIONS)  # where parameters are put in
STEP_KEYS = ("at", "evict", "exit", "merge", "name", "rest", "scope", "score", "select", "until")
ACTIONS = ("select", "merge", "exit")
SITES = (
    "vision.K, projector or language.K (K a block, 0-based; -1 the last; 25% by depth; "
    "1..-2, 1..-2/2 or all for several)"
)
WORDS: dict[Kind, str] = {
    "score": "a score",
    "select": "a selector",
    "rest": "a rest rule",
    "merge": "a merge",
    "when": "an exit gate",
}
GATE = "threshold"  # the gate that `when: {score: ..., above: ...}` stands for

_Choice = TypeVar("_Choice", bound=str)


def parse(document: Document) -> Policy:
    """The policy a flattened document (its `extends` already merged) stands for.

    Raises:
        PolicyError: with the file and line, and what to write instead.
    """
    top = _mapping(document, (), document.data, "the policy")
    for key in top:
        if key not in TOP_KEYS:
            raise document.unknown((key,), key, TOP_KEYS, "the policy")
    _version(document, top)
    parameters = _mapping(document, ("parameters",), top.get("parameters", {}), "`parameters`")
    expanded = filled(document, parameters, TEMPLATED, TOP_KEYS)
    alone = isinstance(expanded.data.get("positions"), dict)  # as other rules that need no step beside them
    alone = alone or any(expanded.data.get(key) is not None for key in ("reselect", *OPTIONS))
    raw = expanded.data.get("steps", [] if alone else None)
    if not isinstance(raw, list) or (not raw and "steps" in expanded.data):
        raise document.error(
            ("steps",),
            "the policy has no steps" if not raw else "`steps` is not a list",
            got=_kind(raw),
            want="a list with at least one step",
            fix="write steps: and below it - at: language.2",
            slug="no-steps",
        )
    steps = tuple(_step(expanded, ("steps", i), value) for i, value in enumerate(raw))
    _ordered(expanded, steps)
    check_beside(expanded, steps)
    return Policy(
        name=_text(document, ("name",), top.get("name", "unnamed")),
        steps=steps,
        positions=read_positions(expanded),
        reselect=read_reselect(expanded),
        **read_options(expanded),
        document=document,
        about=_text(document, ("about",), top.get("about", "")),
        reference=_mapping(document, ("reference",), top.get("reference", {}), "`reference`"),
        covers=_text(document, ("covers",), top.get("covers", "")),
        deviations=_texts(document, top, "deviations"),
        unverified=_texts(document, top, "unverified"),
        parameters=top.get("parameters", {}),
        budgets=published(document, parse) if "budgets" in top else {},
        measure=_choice(document, ("measure",), top.get("measure", "last"), MEASURES),
    )


def _texts(document: Document, top: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts = top.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong(document, (key,), texts, "a list of texts", f"write {key}: [text, text]")
    return tuple(texts)


def _version(document: Document, top: Mapping[str, Any]) -> None:
    version = top.get("version")
    if version == VERSION and isinstance(version, int) and not isinstance(version, bool):
        return
    raise document.error(
        ("version",),
        "the policy does not say its version" if version is None else "the policy is of a version that is not known",
        got="no version" if version is None else repr(version),
        want=VERSION,
        fix=f"write version: {VERSION}",
        slug="bad-version",
    )


# Steps ----------------------------------------------------------------------------------------------------------------


def _step(document: Document, path: Path, raw: Any) -> Step:
    step = _mapping(document, path, raw, f"step {path[-1]}")
    for key in step:
        if key not in STEP_KEYS:
            raise document.unknown((*path, key), key, STEP_KEYS, f"step {path[-1]}")
    actions = [key for key in ACTIONS if key in step]
    if len(actions) != 1:
        several = len(actions) > 1
        raise document.error(
            path,
            f"step {path[-1]} has both `{actions[0]}` and `{actions[1]}`"
            if several
            else f"step {path[-1]} reduces nothing",
            got=" and ".join(actions) if several else ", ".join(step) or "no keys",
            want="one of `select`, `merge` and `exit`",
            fix="write them as two steps" if several else "add select: {top: {keep: 50%}}, or exit: {when: always}",
            slug="select-and-exit" if several else "no-action",
        )
    common: dict[str, Any] = {
        "at": _at(document, path, step),
        "scope": SCOPES[_choice(document, (*path, "scope"), step.get("scope", "image"), tuple(SCOPES))],
        "name": _text(document, (*path, "name"), step.get("name", "")),
        "evict": written(document, path, step),
        "until": returns(document, path, step),
        "where": document.where(path),
        "number": path[-1],
    }
    if actions[0] != "select":
        check_alone(document, path, common["until"], actions[0])
        _alone(document, path, step, actions[0])
        if actions[0] == "merge":
            return Step(merge=_primitive(document, (*path, "merge"), step["merge"], "merge"), **common)
        return Step(exit=_exit(document, (*path, "exit"), step["exit"]), **common)
    select = _primitive(document, (*path, "select"), step["select"], "select")
    rest = _primitive(document, (*path, "rest"), step.get("rest", "drop"), "rest")
    check_alone(document, path, common["until"], "select", rest.key)
    scores = _scores(document, (*path, "score"), step["score"]) if "score" in step else ()
    users = [p for p in (select, rest) if p.needs_score]
    if users and not scores:
        raise document.error(
            path,
            f"step {path[-1]} has no score, and `{users[0].key}` needs one",
            got="no score",
            want=f"one of {', '.join(sorted(PRIMITIVES['score']))}",
            fix="add score: {attention: {of: last, layer: previous}}, or choose with select: {stride: {keep: 25%}}",
            slug="no-score",
        )
    if scores and not users and not select.weighs_score:
        raise document.error(
            (*path, "score"),
            f"step {path[-1]} has a score that nothing uses",
            got=", ".join(s.primitive.key for s in scores),
            want=f"no score: `{select.key}` and `{rest.key}` take none",
            fix="remove the score, or choose with select: {top: ...}",
            slug="unused-score",
        )
    return Step(score=scores, select=select, rest=rest, **common)


def _alone(document: Document, path: Path, step: Mapping[str, Any], action: str) -> None:
    """Refuses what belongs to a selection beside an exit or a merge."""
    for key in ("score", "rest"):
        if key in step:
            exits = action == "exit"
            inside = "write it inside: exit: {when: {score: ..., above: 0.5}}"
            raise document.error(
                (*path, key),
                f"step {path[-1]} is {'an' if exits else 'a'} {action} and has a `{key}` that nothing uses",
                got=key,
                want=f"at and {action}",
                fix=inside if exits and key == "score" else "remove it",
                slug="unused-score" if key == "score" else "unused-rest",
            )


def _at(document: Document, path: Path, step: Mapping[str, Any]) -> str:
    at = step.get("at")
    named = (parse_site(at) or parse_sites(at)) if isinstance(at, str) else None
    if named is not None:
        return str(named)
    close = nearest(at.partition(".")[0], COMPONENTS) if isinstance(at, str) else None
    raise document.error(
        (*path, "at") if "at" in step else path,
        f"step {path[-1]} does not say where it acts" if at is None else f"step {path[-1]} acts at no known site",
        got="no `at`" if at is None else at,
        want=SITES,
        fix=f"write at: {close}" + ("" if close == "projector" else ".2") if close else "write at: language.2",
        slug="bad-site-name",
    )


def _exit(document: Document, path: Path, raw: Any) -> Exit:
    body = _mapping(document, path, raw, "`exit`")
    for key in body:
        if key != "when":
            raise document.unknown((*path, key), key, ("when",), "`exit`")
    if "when" not in body:
        raise document.error(
            path,
            "an exit does not say when it happens",
            got="no `when`",
            want="always, or a threshold on a score",
            fix="write exit: {when: always}",
            slug="no-gate",
        )
    here, when = (*path, "when"), body["when"]
    if isinstance(when, dict) and "score" in when:
        scores = _scores(document, (*here, "score"), when["score"])
        settings = {key: value for key, value in when.items() if key != "score"}
        return Exit(_build(document, here, settings, "when", GATE), scores)
    bare = isinstance(when, dict) and ("above" in when or "below" in when)
    if bare or when == GATE or (isinstance(when, dict) and GATE in when):
        raise document.error(
            here,
            "an exit has a threshold and no score to compare with it",
            got=when if isinstance(when, str) else ", ".join(when),
            want="score, and above or below",
            fix="write when: {score: {attention: {of: last, layer: previous}}, reduce: max, above: 0.5}",
            slug="no-score",
        )
    return Exit(_primitive(document, here, when, "when"))


def _scores(document: Document, path: Path, raw: Any) -> tuple[WeightedScore, ...]:
    if isinstance(raw, list):
        if not raw:
            raise _wrong(document, path, raw, "at least one score", "write score: {norm: {of: feature}}")
        return tuple(_weighted(document, (*path, i), item) for i, item in enumerate(raw))
    return (_weighted(document, path, raw),)


def _weighted(document: Document, path: Path, raw: Any) -> WeightedScore:
    if not isinstance(raw, dict):
        return WeightedScore(_primitive(document, path, raw, "score"))
    weight = raw.get("weight", 1.0)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight == 0:
        raise _wrong(document, (*path, "weight"), weight, "a finite number other than 0", "write weight: 0.5")
    normalize = _choice(document, (*path, "normalize"), raw.get("normalize", "none"), NORMALIZE)
    named = {key: value for key, value in raw.items() if key not in ("weight", "normalize")}
    return WeightedScore(_primitive(document, path, named, "score"), float(weight), normalize)


def _primitive(document: Document, path: Path, raw: Any, kind: Kind) -> Any:
    """`drop`, or `{top: {keep: 25%}}`: a primitive's name alone, or with its settings."""
    known = PRIMITIVES[kind]
    body = {raw: {}} if isinstance(raw, str) else raw
    if not isinstance(body, dict) or len(body) != 1:
        several = isinstance(body, dict) and len(body) > 1
        stranger = next((k for k in body if k not in known), None) if isinstance(body, dict) else None
        if several and stranger is not None:
            legal = {*known, "weight", "normalize"} if kind == "score" else known
            raise document.unknown((*path, stranger), stranger, legal, WORDS[kind])
        raise document.error(
            path,
            f"{WORDS[kind]} has more than one name" if several else f"{WORDS[kind]} has no name",
            got=", ".join(body) if several else _kind(raw),
            want=f"one of {', '.join(sorted(known))}",
            fix="write them as a list" if several and kind == "score" else f"write {min(known, default='a name')}: ...",
            slug="wrong-type",
        )
    ((key, settings),) = body.items()
    if key not in known:
        close = nearest(key, known)
        raise document.error(
            path if isinstance(raw, str) else (*path, key),
            f"{WORDS[kind]} of that name does not exist",
            got=key,
            want=f"one of {', '.join(sorted(known))}",
            fix=f'write "{close}"' if close else "choose one of them",
            slug=f"unknown-{'gate' if kind == 'when' else kind}",
        )
    return _build(document, path if isinstance(raw, str) else (*path, key), settings, kind, key)


def _build(document: Document, path: Path, settings: Any, kind: Kind, key: str) -> Any:
    cls: type[Primitive] = PRIMITIVES[kind][key]
    if settings is None:
        settings = {}
    if not isinstance(settings, dict) and cls.shorthand is None:
        want = f"a mapping with {', '.join(cls.model_fields)}" if cls.model_fields else "no settings"
        raise _wrong(document, path, settings, want, f"write {key}: {{}}")
    made = build(cls, document, path, settings)
    if not isinstance(made, Trained):
        return made
    inside = (*path, "weights") if isinstance(settings, dict) else path
    return made.model_copy(update={"weights": Weights(made.weights.name, document.folder(inside))})


def _ordered(document: Document, steps: tuple[Step, ...]) -> None:
    """Refuses two steps at one site, steps out of pipeline order, and steps behind an exit that always happens."""
    for i, step in enumerate(steps):
        if behind(step.span.first, step.span.last):
            raise document.error(
                ("steps", i, "at"),
                f"step {i} acts at a range of blocks that ends before it starts",
                got=step.at,
                want="the earlier block first",
                fix="swap the two ends of the range",
                slug="empty-range",
            )
    for i, (step, following) in enumerate(itertools.pairwise(steps)):
        path: Path = ("steps", i + 1)
        one, two = step.span.last, following.span.first
        if one == two:
            raise document.error(
                (*path, "at"),
                f"steps {i} and {i + 1} act at the same site, and nothing says which comes first",
                got=f"{two} twice",
                want="one step per site",
                fix="join them into one step, or move one to another layer",
                slug="same-site",
            )
        ranks = COMPONENTS.index(one.component), COMPONENTS.index(two.component)
        if ranks[0] > ranks[1] or (ranks[0] == ranks[1] and behind(one, two)):
            raise document.error(
                (*path, "at"),
                f"step {i + 1} acts before step {i}: steps are not in the order in which tokens pass them",
                got=f"{one}, then {two}",
                want=f"{two}, then {one}",
                fix="write the steps in the order vision, projector, language, each by rising layer",
                slug="step-order",
            )
        if step.exit is not None and step.exit.gate.key == "always":
            raise document.error(
                path,
                f"step {i + 1} can never act: step {i} has dropped every visual token",
                got=f"a step behind exit at {one}",
                want="exit: {when: always} as the last step",
                fix="remove the later steps, or give the exit a threshold",
                slug="unreachable-step",
            )


# Small checks ---------------------------------------------------------------------------------------------------------


def _kind(value: object) -> str:
    """A value in plain words, for `got`."""
    if value is None:
        return "nothing"
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number") + (f" ({value})" if isinstance(value, (str, int, float)) else "")


def _wrong(document: Document, path: Path, value: object, want: str, fix: str) -> Exception:
    return document.error(path, "a value is of the wrong kind", got=_kind(value), want=want, fix=fix, slug="wrong-type")


def _mapping(document: Document, path: Path, value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise document.error(
        path,
        f"{what} is not a mapping",
        got=_kind(value),
        want="keys and values",
        fix="write key: value lines",
        slug="wrong-type",
    )


def _text(document: Document, path: Path, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(document, path, value, "text", "write text; put numbers and true or false in quotes")


def _choice(document: Document, path: Path, value: Any, choices: tuple[_Choice, ...]) -> _Choice:
    if value in choices:
        return value  # type: ignore[no-any-return]
    close = nearest(value, choices) if isinstance(value, str) else None
    raise document.error(
        path,
        f"`{path[-1]}` has a value that it can't have",
        got=value,
        want=f"one of {', '.join(choices)}",
        fix=f'write "{close or choices[0]}"',
        slug="bad-value",
    )
