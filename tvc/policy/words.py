"""A policy in words: what each step does, from the first sentence of each of its primitives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from tvc.kernels.op import Primitive
from tvc.policy.bypass import in_words as until_words
from tvc.policy.evictions import EARLIER
from tvc.policy.positions import Rescale, Stride
from tvc.policy.reselection import in_words as decode_steps
from tvc.policy.schema import Policy, Step, WeightedScore

_SCOPES = {"image": "in each image", "frame": "in each frame", "sequence": "in all images of a prompt together"}


def in_words(policy: Policy) -> list[str]:
    """Lines: what the policy is for, then every step with its parts and their settings."""
    lines = [policy.about] if policy.about else []
    paper = policy.reference.get("paper")
    lines += [f"Paper: {paper}."] if paper and paper != "none" else []
    lines += [f"Covers {policy.covers}"] if policy.covers else []
    means = ", means over the layers" if policy.measure == "average" else ""
    lines += [f"Published for budgets of {', '.join(policy.budgets)}{means}."] if policy.budgets else []
    if isinstance(policy.positions, Stride):
        meaning = (inspect.getdoc(Stride) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"Positions (stride: {policy.positions.stride}): {meaning}")
    if isinstance(policy.positions, Rescale):
        lines.append(f"Positions by {_phrase(policy.positions)}")
    lines += [f"{place.capitalize()} by {_phrase(option)}" for place, option in policy.options.items() if option]
    for number, step in enumerate(policy.steps, start=1):
        lines.append(f"{number}. Before {step.at}, {_SCOPES.get(step.scope, step.scope)}:")
        lines += [f"   {part:<7} {text}" for part, text in _parts(step)]
    lines += [decode_steps(policy.reselect)] if policy.reselect is not None else []
    return lines


def _parts(step: Step) -> Iterator[tuple[str, str]]:
    yield from _scores("score", step.score)
    parts = step.parts()
    for name in ("select", "rest", "merge"):
        if name in parts:
            yield name, _phrase(parts[name])
    if step.exit is not None:
        yield from _scores("score", step.exit.score)
        yield "exit", _phrase(step.exit.gate)
    if step.evict:
        caches = "all earlier layers" if step.evict == EARLIER else f"{step.evict} and the layers behind it"
        yield "evict", f"{step.evict}: What is dropped leaves the caches of {caches} once the chunk has been read."
    if step.until:
        yield "until", until_words(step)


def _scores(name: str, terms: Sequence[WeightedScore]) -> Iterator[tuple[str, str]]:
    for term in terms:
        how = [f"{term.weight:g} times"] if term.weight != 1 else []
        how += [f"normalised by {term.normalize}"] if term.normalize != "none" else []
        yield name, _phrase(term.primitive) + (f" ({', '.join(how)})" if how else "")


def _phrase(primitive: Primitive) -> str:
    """`top (keep: 50%): The best-scored tokens of each scope stay.`"""
    settings = primitive.model_dump(mode="json", exclude_none=True)
    written = ", ".join(f"{key}: {_value(value)}" for key, value in settings.items())
    meaning = (inspect.getdoc(type(primitive)) or "").split("\n\n")[0].replace("\n", " ")
    return f"{primitive.key}{f' ({written})' if written else ''}: {meaning}"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def preset_table(policies: Sequence[Policy]) -> str:
    """Markdown: one line a preset."""
    rows = ["| preset | paper | what it does |", "|---|---|---|"]
    for policy in policies:
        paper = str(policy.reference.get("paper", "none"))
        rows.append(f"| `{policy.name}` | {paper if paper != 'none' else '-'} | {policy.about} |")
    return "\n".join(rows)
