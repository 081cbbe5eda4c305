"""Tokens that pass by some decoder layers and take part again behind them: what a step's `until` may say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvc.kernels.op import Tap
from tvc.policy.document import Document, Path
from tvc.policy.options import OPTIONS
from tvc.policy.schema import Policy, SiteName, Step, parse_site, parse_sites
from tvc.policy.whole import refusal
from tvc.program import Layout

NEXT, NEVER = "next", "never"
_OF_LAYERS = ("attention", "key", "transition")  # taps that a layer has of the tokens that ran through it


def written(document: Document, path: Path, step: Mapping[str, Any]) -> str:
    """The step's `until` as it is written, "" where its tokens never come back; `at` is a site already.

    Raises:
        PolicyError: it names no layer of the decoder, or the step does not act in front of one.
    """
    until = step.get("until")
    if until is None or until == NEVER:
        return ""
    here, named = (*path, "until"), parse_site(until) if isinstance(until, str) else None
    if until != NEXT and (named is None or named.component != "language"):
        raise document.error(
            here,
            f"step {path[-1]} does not say where the tokens that it drops take part again",
            got=until,
            want="next, never, or language.K: the first layer that they run through again",
            fix="write until: next",
            slug="bad-until",
        )
    if not step["at"].startswith("language."):
        raise document.error(
            here,
            f"step {path[-1]} drops tokens in front of the decoder, and only layers of the decoder can be passed by",
            got=f"until: {until} at {step['at']}",
            want="a step at a language site",
            fix="leave until out",
            slug="nothing-to-pass-by",
        )
    if until != NEXT and parse_sites(step["at"]) is not None:
        raise document.error(
            here,
            f"step {path[-1]} acts at several sites, and would still be under way at the second one",
            got=f"until: {until} at {step['at']}",
            want="next: each layer of the range is passed by alone",
            fix="write until: next, or one site",
            slug="until-of-a-range",
        )
    return str(until)


def check_alone(document: Document, path: Path, until: str, action: str, rest: str = "drop") -> None:
    """Refuses `until` where a step does more than drop what it does not select.

    Raises:
        PolicyError: it merges tokens, or lets all of them leave.
    """
    if not until or (action == "select" and rest == "drop"):
        return
    exits, merges = action == "exit", "merges tokens, which cannot come back beside what they are merged into"
    raise document.error(
        (*path, "until"),
        f"step {path[-1]} {'is an exit, behind which no visual token comes back' if exits else merges}",
        got=f"{f'rest: {rest}' if action == 'select' else action}, until: {until}",
        want="select and rest: drop",
        fix="write rest: drop, or leave until out" if action == "select" else "leave until out",
        slug="until-of-an-exit" if exits else "until-of-a-merge",
    )


def check_beside(document: Document, steps: Sequence[Step]) -> None:
    """Refuses what is not defined beside steps whose tokens come back.

    Raises:
        PolicyError: caches lose tokens, decode steps choose among them, or tokens see some chunks alone.
    """
    returning = next((step for step in steps if step.until), None)
    if returning is None:
        return
    evicting = next((step for step in steps if step.evict), None)
    others: dict[str, Path] = {} if evicting is None else {"evict": ("steps", evicting.number, "evict")}
    others |= {key: (key,) for key in ("reselect", *OPTIONS) if document.data.get(key) is not None}
    for key, path in others.items():
        raise document.error(
            path,
            f"`{key}` is not defined where tokens pass by some layers and come back",
            got=f"{key}, and until: {returning.until} in step {returning.number}",
            want="one of the two",
            fix=f"remove {key}, or leave until out",
            slug="not-beside-until",
        )


def settled(policy: Policy, layout: Layout, path: Path, step: Step, site: SiteName, named: SiteName | None) -> str:
    """The layer that `until` means in a model; "" where no layer follows the one that is passed by.

    Args:
        named: the layer that is written, in the model's own numbers; None for the next one.

    Raises:
        SiteError: it does not follow the step, tokens cannot come back there, or a layer that would be passed by is
            none that they can pass by.
    """
    first, here = site.index or 0, (*path, "until")
    last = first + 1 if named is None else named.index or 0
    if named is None and last == len(layout.language):
        return ""
    if last <= first:
        raise refusal(
            policy,
            here,
            f"no layer in front of language.{last} is one that the tokens could pass by",
            got=f"until: {step.until} at {site}",
            want=f"language.{first + 1}..{len(layout.language) - 1}"
            if first + 1 < len(layout.language)
            else "no until",
            fix="write until: next",
            slug="until-before-the-step",
        )
    known = layout.site(f"language.{last}")
    if known is None or not known.legal:
        raise refusal(
            policy,
            here,
            f"tokens cannot come back at language.{last} of {layout.model_type}",
            got=f"language.{last}: {known.reason}" if known else f"language.{last}, which this model does not have",
            want="a site at which the model can be cut",
            fix="choose a later layer, or leave until out",
            slug="illegal-site",
        )
    passed = range(first, last)
    if any(layer.crosses for layer in layout.language):
        why = "its text reads visual tokens by cross-attention: they run through no layer that they could pass by"
    elif blind := [index for index in passed if not layout.language[index].heads]:
        why = f"language.{blind[0]} mixes neighbours, which are others where tokens pass by"
    else:
        return f"language.{last}"
    raise refusal(
        policy,
        here,
        f"visual tokens cannot pass by layers {first}..{last - 1} of {layout.model_type}",
        got=why,
        want="layers in which tokens attend to each other",
        fix="choose other layers, or leave until out",
        slug="no-bypass",
    )


def check_bypasses(policy: Policy, steps: Sequence[Step]) -> None:
    """Refuses, of resolved steps, those that act among tokens of which some are passing by, or ask for what these lack.

    Raises:
        SiteError: a step stands where an earlier one's tokens have not come back, looks into a layer that they passed
            by, or counts what all layers so far held.
    """
    passed: list[tuple[Step, range]] = []
    for step in (one for one in steps if one.site.component == "language"):
        before, layers = passed[-1] if passed else (None, range(0))
        if before is not None and (step.site.index or 0) < layers.stop:
            raise refusal(
                policy,
                ("steps", step.number, "at"),
                f"step {step.number} acts where tokens of step {before.number} are passing by",
                got=f"{step.at}, and until: {before.until} at {before.at}",
                want=f"{before.until} or a later layer",
                fix=f"write at: {before.until}, or let step {before.number} end at {step.at}",
                slug="inside-a-bypass",
            )
        for tap in (tap for primitive in step.primitives() for tap in primitive.taps().values()):
            _check_tap(policy, step, tap, passed)
        if step.until:
            passed.append((step, range(step.site.index or 0, int(step.until.removeprefix("language.")))))


def _check_tap(policy: Policy, step: Step, tap: Tap, passed: Sequence[tuple[Step, range]]) -> None:
    path = ("steps", step.number)
    if passed and tap.kind == "spent":
        one, _ = passed[0]
        raise refusal(
            policy,
            path,
            f"step {step.number} counts the tokens of all layers so far, some of which passed by",
            got=f"a step at {step.at}, and until: {one.until} at {one.at}",
            want="a budget of its own",
            fix="choose with select: {top: ...}, or leave until out",
            slug="layer-passed-by",
        )
    named = parse_site(tap.layer or "") if tap.kind in _OF_LAYERS else None
    if named is None or named.component != "language":
        return
    for one, layers in passed:
        if named.index in layers:
            raise refusal(
                policy,
                path,
                f"{named} knows nothing of the tokens that passed it by",
                got=f"layer: {named} at {step.at}, and until: {one.until} at {one.at}",
                want=f"a layer outside {layers.start}..{layers.stop - 1}",
                fix="write layer: self, or score by something else",
                slug="layer-passed-by",
            )


def in_words(step: Step) -> str:
    """`next: What is dropped ...`, for the reader of a policy."""
    place = "the layer behind" if step.until == NEXT else step.until
    return f"{step.until}: What is dropped passes by, and takes part again from {place} on as it was."
