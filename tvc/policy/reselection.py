"""Decode steps that attend to some of the cached visual tokens, chosen anew in every step: what `reselect` may say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from tvc.kernels.budget import Budget
from tvc.kernels.op import Primitive
from tvc.policy.document import Document
from tvc.policy.explain import build
from tvc.policy.schema import Policy, SiteName, Step, parse_site
from tvc.policy.whole import refusal
from tvc.program import Layout

PATH = ("reselect",)
PREVIOUS = "previous"
Concrete = Callable[[tuple[str, ...], SiteName], SiteName]


class Reselect(Primitive):
    """In a decode step, `at` and the layers behind it attend to the cached visual tokens that get most attention."""

    key: ClassVar[str] = "reselect"
    at: str = Field(description="language.K: the first layer that attends to fewer")
    keep: Budget = Field(description="what is attended to of the cached visual tokens of a sample")
    layer: str = Field(PREVIOUS, description="whose attention tells: previous, or language.K")
    unless_alike: float | None = Field(
        None, gt=0, le=1, description="cosine of a step's attention and the one before, from which on nothing is chosen"
    )
    bug_compatible: bool = Field(
        False, description="whether a step alike attends to everything, as in DyCoke's code, and not to the last choice"
    )

    @model_validator(mode="after")
    def _together(self) -> Reselect:
        if self.keep.average is not None:
            raise ValueError("the layers of a decode step have no average of their own: give keep a count or a share")
        if self.bug_compatible and self.unless_alike is None:
            raise ValueError("bug_compatible is about steps alike: give unless_alike")
        return self

    @property
    def first(self) -> int:
        """The first layer that attends to fewer tokens; of a resolved policy."""
        return (parse_site(self.at) or SiteName("language", 0)).index or 0

    @property
    def observed(self) -> int:
        """The layer whose attention tells; of a resolved policy."""
        return (parse_site(self.layer) or SiteName("language", 0)).index or 0

    @property
    def alike(self) -> float:
        """From which cosine on nothing is chosen anew; 0: never."""
        return self.unless_alike or 0.0


def read_reselect(document: Document) -> Reselect | None:
    """What the expanded policy says under `reselect`; None where it says nothing.

    Raises:
        PolicyError: a key that there is not or that is missing, or a value that cannot be.
    """
    settings = document.data.get("reselect")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise document.error(
            PATH,
            "`reselect` does not say from where on decode steps attend to fewer tokens",
            got=settings,
            want="at and keep",
            fix="write reselect: {at: language.3, keep: 30%}",
            slug="wrong-type",
        )
    made: Any = build(Reselect, document, PATH, settings)
    for key, written in (("at", made.at), ("layer", made.layer)):
        named = parse_site(written)
        if (named is None or named.component != "language") and (key, written) != ("layer", PREVIOUS):
            raise document.error(
                (*PATH, key),
                "`reselect` names no layer of the decoder, where tokens are cached",
                got=written,
                want="language.K" if key == "at" else f"{PREVIOUS}, or language.K",
                fix="write at: language.3" if key == "at" else f"write layer: {PREVIOUS}",
                slug="bad-site-name",
            )
    return made  # type: ignore[no-any-return]


def settled(policy: Policy, layout: Layout, steps: Sequence[Step], concrete: Concrete) -> Reselect | None:
    """The policy's `reselect` with the layers that it means in a model.

    Args:
        steps: the resolved ones.
        concrete: gives the layer that a site means.

    Raises:
        SiteError: no layer with attention runs before `at`, what it tells has been cut by then, or nothing is left.
    """
    asked = policy.reselect
    if asked is None:
        return None
    if policy.cache is not None:
        raise refusal(
            policy,
            PATH,
            "decode steps choose among cached tokens, and `cache` puts means of several in their places",
            got=f"reselect, and cache: {policy.cache.key}",
            want="one of the two",
            fix="leave cache out, or reselect",
            slug="two-rules",
        )
    site, layers = concrete((*PATH, "at"), _named(asked.at)), layout.language
    own, known = site.index or 0, layout.site(str(site))
    if known is not None and not known.legal:
        raise refusal(
            policy,
            (*PATH, "at"),
            f"decode steps of {layout.model_type} have no visual tokens to choose among",
            got=f"{site}: {known.reason}",
            want="a model whose visual tokens stand in the decoder's sequence",
            fix="leave reselect out",
            slug="illegal-site",
        )
    if asked.layer == PREVIOUS:
        layer = next((index for index in range(own - 1, -1, -1) if layers[index].heads), own)
    else:
        layer = concrete((*PATH, "layer"), _named(asked.layer)).index or 0
    if layer >= own or not layers[layer].heads:
        raise refusal(
            policy,
            (*PATH, "at" if asked.layer == PREVIOUS else "layer"),
            "`reselect` chooses by the attention of a layer that runs before it, and there is none",
            got=f"layer: {asked.layer} at {site}",
            want="a layer with attention in front of `at`",
            fix="write at: language.3" if asked.layer == PREVIOUS else f"write layer: {PREVIOUS}",
            slug="no-layer",
        )
    for step in steps:
        index = step.site.index or 0
        gone = step.exit is not None and step.exit.gate.key == "always"
        if gone or (step.site.component == "language" and index > layer):
            raise refusal(
                policy,
                PATH,
                f"step {step.number} has dropped every visual token that could be chosen"
                if gone
                else f"step {step.number} drops tokens behind language.{layer}, whose attention tells which to choose",
                got=f"a step at {step.at}, and layer: language.{layer}",
                want="visual tokens that stay in the caches" if gone else "a layer behind every step",
                fix="leave reselect out" if gone else f"write at: language.{index + 1}, or a later one",
                slug="nothing-cached" if gone else "layer-before-a-cut",
            )
    return asked.model_copy(update={"at": str(site), "layer": f"language.{layer}"})


def _named(text: str) -> SiteName:
    return parse_site(text) or SiteName("language", 0)


def in_words(rule: Reselect) -> str:
    """What a decode step does."""
    layer = "the layer before" if rule.layer == PREVIOUS else rule.layer
    otherwise = "all of them" if rule.bug_compatible else "those of the step before"
    unless = f", or {otherwise}, where its attention is {rule.alike:g} alike" if rule.alike else ""
    return (
        f"In every decode step {rule.at} and the layers behind it attend, of the cached visual tokens, to {rule.keep}: "
        f"those that the new token pays most attention to in {layer}{unless}. Caches hold all."
    )
