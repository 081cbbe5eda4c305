"""Scores that remember earlier calls on the same cache: where a policy may ask for one, and beside what."""

from __future__ import annotations

from collections.abc import Sequence

from tvc.policy.options import OPTIONS
from tvc.policy.schema import Policy, Step, WeightedScore
from tvc.policy.whole import refusal


def check_memories(policy: Policy, steps: Sequence[Step]) -> None:
    """Refuses, of resolved steps, scores with a memory where what a later call goes on with is not defined.

    Raises:
        SiteError: the score belongs to an exit, or one comes before it; or something else changes what layers or caches
            hold of earlier calls.
    """
    remembering = [step for step in steps if _remembers(step)]
    if not remembering:
        return
    step = remembering[-1]
    leaving = next((one for one in steps if one.exit is not None and one.number <= step.number), None)
    if leaving is not None:
        raise refusal(
            policy,
            ("steps", step.number, "score" if leaving is not step else "exit"),
            f"step {step.number} remembers what it has seen, and whether it sees anything hangs on an exit",
            got=f"a score with a memory behind the exit at {leaving.at}"
            if leaving is not step
            else "a score with a memory in the gate of an exit",
            want="a score of select, in front of every exit",
            fix="write memory: call, or move the exit behind the step",
            slug="memory-behind-an-exit",
        )
    others = {key: (key,) for key in ("reselect", *OPTIONS) if policy.document.data.get(key) is not None}
    named = {key: next((one for one in steps if getattr(one, key)), None) for key in ("evict", "until")}
    places = {key: ("steps", one.number, key) for key, one in named.items() if one is not None}
    for key, place in (others | places).items():
        raise refusal(
            policy,
            place,
            f"`{key}` is not defined beside a score that remembers earlier calls",
            got=f"{key}, and a memory in step {step.number}",
            want="one of the two",
            fix=f"write memory: call, or leave {key} out",
            slug="not-beside-memory",
        )


def _remembers(step: Step) -> bool:
    terms: tuple[WeightedScore, ...] = step.score if step.exit is None else step.exit.score
    return any(tap.states for term in terms for tap in term.primitive.taps().values())
