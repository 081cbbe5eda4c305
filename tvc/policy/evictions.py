"""Tokens that leave the caches of earlier layers, too: what a step's `evict` may say, alone and beside other steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvc.policy.document import Document, Path
from tvc.policy.schema import Policy, SiteName, Step, parse_site
from tvc.policy.whole import refusal

EARLIER = "earlier"  # all layers in front of the step


def written(document: Document, path: Path, step: Mapping[str, Any]) -> str:
    """The step's `evict` as it is written, "" where there is none; `at` is a site already.

    Raises:
        PolicyError: it names no layer of the decoder, or the step acts where no layer has cached anything.
    """
    evict = step.get("evict")
    if evict is None:
        return ""
    named = parse_site(evict) if isinstance(evict, str) else None
    if evict != EARLIER and (named is None or named.component != "language"):
        raise document.error(
            (*path, "evict"),
            f"step {path[-1]} does not say which caches lose the tokens that it drops",
            got=evict,
            want="earlier, or language.K: the first of these layers",
            fix="write evict: earlier",
            slug="bad-evict",
        )
    if not step["at"].startswith("language."):
        raise document.error(
            (*path, "evict"),
            f"step {path[-1]} drops tokens that no decoder layer has cached",
            got=f"evict at {step['at']}",
            want="a step at a language site",
            fix="leave evict out",
            slug="nothing-cached",
        )
    return str(evict)


def start(step: Step) -> SiteName:
    """The first layer whose cache loses tokens, as it is written."""
    return parse_site(step.evict) or SiteName("language", 0)


def settled(policy: Policy, path: Path, step: Step, site: SiteName, first: SiteName) -> str:
    """`first`, the layer that `evict` means in a model; a share that comes to the step's own layer is the one before.

    Raises:
        SiteError: it does not run before the step.
    """
    index, own = first.index or 0, site.index or 0
    if index == own and own and start(step).percent:
        index -= 1
    if index < own:
        return f"language.{index}"
    raise refusal(
        policy,
        (*path, "evict"),
        f"no layer from {first} on runs before {site}",
        got=f"evict: {step.evict} at {site}",
        want=f"language.0..{own - 1}, or earlier" if own else "a later site, which has layers in front of it",
        fix="write evict: earlier" if own else "leave evict out",
        slug="nothing-cached",
    )


def check_evictions(policy: Policy, steps: Sequence[Step]) -> None:
    """Refuses, of resolved steps, what no cache can be cut by.

    Raises:
        SiteError: a step takes tokens out of caches in which an earlier one leaves its own; caches of layers that share
            running numbers differ in length.
    """
    inside = [step for step in steps if step.site.component == "language"]
    cuts = [step.site.index or 0 for step in inside]
    for number, step in enumerate(inside):
        if not step.evict:
            continue
        first, path = start(step).index or 0, ("steps", step.number, "evict")
        before = inside[number - 1] if number and first < cuts[number - 1] else None
        if before is not None and (not before.evict or (start(before).index or 0) > first):
            raise refusal(
                policy,
                path,
                f"step {step.number} takes its tokens out of caches in which step {before.number} leaves its own",
                got=f"evict: {step.evict} at {step.at}, and {before.evict or 'no evict'} at {before.at}",
                want=f"evict: {step.evict} in both of them, or layers from {before.at} on",
                fix=f"write evict: {step.evict} in step {before.number} as well",
                slug="evict-gap",
            )
        opened = [cut for cut in cuts[:number] if cut < first]
        if policy.positions == "renumber" and opened and first not in cuts:
            raise refusal(
                policy,
                path,
                "positions are numbered afresh at a cut, for all layers up to the next one, of which some would hold "
                "fewer tokens than others",
                got=f"evict: {step.evict} behind the cut at language.{opened[-1]}, positions: renumber",
                want="the site of a cut, or positions: keep",
                fix=f"write evict: language.{opened[-1]}",
                slug="evict-inside-a-stage",
            )
