"""The policy as typed, frozen values: what the rest of the compiler reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from tvc.kernels.op import Merging, Primitive, Rest, Score, Select, When
from tvc.kernels.weights import Trained
from tvc.policy.document import Document
from tvc.policy.options import Chunks, Option, Pool, Unrotated, options_data
from tvc.policy.positions import Positions, positions_data

if TYPE_CHECKING:
    from tvc.policy.reselection import Reselect

VERSION = 1
Normalize = Literal["none", "minmax", "softmax", "sum"]
ScopeName = Literal["image", "frame", "sequence"]  # a video counts as an image
Measure = Literal["last", "average"]  # tokens behind the last cut, or their mean over the decoder's layers
NORMALIZE, MEASURES = get_args(Normalize), get_args(Measure)
# How a policy may write a scope.
SCOPES: dict[str, ScopeName] = {"image": "image", "clip": "image", "frame": "frame", "sequence": "sequence"}
COMPONENTS = ("vision", "projector", "language")  # in the order in which a visual token passes them
_BLOCK = r"(?:-?\d{1,4}|\d{1,2}%)"
SITE_PATTERN = rf"projector|(vision|language)\.{_BLOCK}"
SPAN_PATTERN = rf"(vision|language)\.(all|{_BLOCK}\.\.{_BLOCK})(?:/[1-9]\d?)?"


@dataclasses.dataclass(frozen=True)
class SiteName:
    """A site as a policy writes it: `vision.-2`, `projector`, `language.16` or, by depth, `language.25%`."""

    component: str
    index: int | None = None  # None for `projector`
    percent: bool = False  # `index` is a share of the component's blocks

    def __str__(self) -> str:
        return self.component if self.index is None else f"{self.component}.{self.index}{'%' * self.percent}"


def parse_site(text: str) -> SiteName | None:
    """The site that `text` names, or None where it names none."""
    if re.fullmatch(SITE_PATTERN, text) is None:
        return None
    component, _, index = text.partition(".")
    return SiteName(component, int(index.rstrip("%")), index.endswith("%")) if index else SiteName(component)


@dataclasses.dataclass(frozen=True)
class Span:
    """Several sites as a policy writes them: `vision.1..-2`, both ends inside, or `vision.all`.

    `all` are the blocks that the visual features depend on; its ends are the component's first and last block. Behind
    a slash stands how far the sites are apart: `language.1..25/2` are every other one, from the first on.
    """

    first: SiteName
    last: SiteName
    every: bool = False
    stride: int = 1

    def __str__(self) -> str:
        component = self.first.component
        ends = f"{component}.all" if self.every else f"{self.first}..{str(self.last).removeprefix(component + '.')}"
        return ends + (f"/{self.stride}" if self.stride > 1 else "")


def parse_sites(text: str) -> Span | None:
    """The sites that `text` names, or None where it names no range of them."""
    if re.fullmatch(SPAN_PATTERN, text) is None:
        return None
    component, _, named = text.partition(".")
    blocks, _, apart = named.partition("/")
    stride = int(apart or 1)
    if blocks == "all":
        return Span(SiteName(component, 0), SiteName(component, -1), every=True, stride=stride)
    one, other = (parse_site(f"{component}.{block}") for block in blocks.split(".."))
    return Span(one, other, stride=stride) if one is not None and other is not None else None


@dataclasses.dataclass(frozen=True)
class WeightedScore:
    """One term of a score: its numbers are normalised within a sample, multiplied by `weight` and added up.

    A term whose layer is a range stands for one term a layer, each with the same weight.
    """

    primitive: Score
    weight: float = 1.0
    normalize: Normalize = "none"


@dataclasses.dataclass(frozen=True)
class Exit:
    """All visual tokens of a sample leave where `gate` says so; `score` is what the gate looks at, if anything."""

    gate: When
    score: tuple[WeightedScore, ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """One reduction: `select` and `rest`, or `merge`, or `exit`.

    `evict`: the first decoder layer whose cache loses what the step drops, "earlier" for the first of all; "" for none.
    `until`: the decoder layer from which on what the step drops takes part again, "next" for the one behind the site's
    own; "" for none.
    `where` is its place in the policy's text, for messages; `number` counts the steps as they were written, of which
    several may come where a step was written for a range of sites.
    """

    at: str
    scope: ScopeName = "image"
    score: tuple[WeightedScore, ...] = ()
    select: Select | None = None
    rest: Rest | None = None
    exit: Exit | None = None
    merge: Merging | None = None
    evict: str = ""
    until: str = ""
    name: str = ""
    where: str = dataclasses.field(default="", compare=False)
    number: int = dataclasses.field(default=0, compare=False)

    @property
    def site(self) -> SiteName:
        """Where the step acts; of a range, the first site as it was written."""
        return self.span.first

    @property
    def span(self) -> Span:
        """The sites as they were written: a single one is its own first and last."""
        site = parse_site(self.at) or SiteName(self.at)
        return parse_sites(self.at) or Span(site, site)

    @property
    def lasts(self) -> bool:
        """Whether tokens are gone for good behind the step; exits leave none or all of them."""
        return self.exit is None and not self.until

    def parts(self) -> dict[str, Primitive]:
        """The primitives beside the scores, by the name under which their taps travel."""
        gate = self.exit.gate if self.exit is not None else None
        named: dict[str, Primitive | None]
        named = {"select": self.select, "rest": self.rest, "merge": self.merge, "when": gate}
        return {name: primitive for name, primitive in named.items() if primitive is not None}

    def primitives(self) -> tuple[Primitive, ...]:
        """Every primitive of the step, in the order in which they act."""
        acting = (self.select, self.rest, self.merge)
        gate = (*(s.primitive for s in self.exit.score), self.exit.gate) if self.exit else ()
        return (*(s.primitive for s in self.score), *(p for p in acting if p is not None), *gate)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A parsed policy. `document` is its text as data, parameters unexpanded, with the lines it came from."""

    name: str
    steps: tuple[Step, ...]
    positions: Positions
    document: Document = dataclasses.field(compare=False, repr=False)
    version: int = VERSION
    about: str = ""
    reference: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    covers: str = ""  # what of the paper it is, where that is not all
    deviations: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    budgets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)  # by share
    measure: Measure = "last"  # what a budget is a share of
    reselect: Reselect | None = None  # what decode steps attend to; None: everything
    attention: Chunks | Unrotated | None = None
    cache: Pool | None = None

    @property
    def options(self) -> dict[str, Option | None]:
        """What the policy says of all layers at once, by its keys."""
        return {"attention": self.attention, "cache": self.cache}

    def to_yaml(self) -> str:
        """The policy as YAML that loads back to an equal policy, parameters included; `extends` is written out."""
        return dump_yaml(self.document.data)

    def digest(self) -> str:
        """sha256 of what the policy does: equal for two texts that differ in names, comments or written defaults."""
        meaning: dict[str, Any] = {
            "positions": positions_data(self.positions),
            "steps": steps_data(self.steps, names=False),
            "version": self.version,
        }
        if self.reselect is not None:
            meaning["reselect"] = reselect_data(self.reselect)
        meaning |= options_data(self.options)
        files = {p.weights for step in self.steps for p in step.primitives() if isinstance(p, Trained)}
        if files:  # what is in them, not where they lie
            meaning["weights"] = {str(file): file.digest() for file in files}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def with_settings(self, settings: Iterable[str] | Mapping[str, Any]) -> Policy:
        """The policy with some values replaced: `["before_layer=3", "steps.0.select.top.keep=25%"]` or a mapping.

        Raises:
            PolicyError: a setting names no parameter and no place in the policy, or its value is refused there.
        """
        from tvc.policy.load import load_policy

        return load_policy(self, set=settings)


class _Dumper(yaml.SafeDumper):
    """Short values on one line, long ones and lists of mappings one entry a line; never an anchor."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=_short(mapping))

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = not any(isinstance(item, dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat and _short(sequence))


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # The emitter writes next-line and its kind raw in plain text, where the reader folds them into spaces.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)


def _short(value: Any) -> bool:
    return len(json.dumps(value)) <= 88


def dump_yaml(data: Any) -> str:
    """YAML that `from_yaml` reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=False)


def primitive_data(primitive: Primitive) -> str | dict[str, Any]:
    """`drop`, or `{top: {keep: 25%}}`, with every default written out."""
    fields = primitive.model_dump(mode="json", exclude_none=True)
    return {primitive.key: fields} if fields else primitive.key


def reselect_data(rule: Reselect) -> dict[str, Any]:
    """`{at: language.3, keep: 30%}`, with every default written out."""
    return rule.model_dump(mode="json", exclude_none=True)


def score_data(scores: tuple[WeightedScore, ...]) -> list[dict[str, Any]]:
    terms = []
    for term in scores:
        named = primitive_data(term.primitive)
        entry = named if isinstance(named, dict) else {named: {}}
        terms.append({**entry, "weight": term.weight, "normalize": term.normalize})
    return terms


def exit_data(gate: Exit) -> dict[str, Any]:
    """`{when: always}`, or `{when: {score: ..., reduce: max, above: 0.5}}` for a gate that looks at a score."""
    named = primitive_data(gate.gate)
    if not gate.score:
        return {"when": named}
    return {"when": {"score": score_data(gate.score), **(named[gate.gate.key] if isinstance(named, dict) else {})}}


def steps_data(steps: tuple[Step, ...], names: bool = True) -> list[dict[str, Any]]:
    """The steps as a policy would write them with every default spelled out."""
    written = []
    for step in steps:
        entry: dict[str, Any] = {"name": step.name} if names and step.name else {}
        entry |= {"at": step.at, "scope": step.scope}
        if step.score:
            entry["score"] = score_data(step.score)
        if step.select is not None:
            entry["select"] = primitive_data(step.select)
        if step.rest is not None:
            entry["rest"] = primitive_data(step.rest)
        if step.merge is not None:
            entry["merge"] = primitive_data(step.merge)
        if step.exit is not None:
            entry["exit"] = exit_data(step.exit)
        if step.evict:
            entry["evict"] = step.evict
        if step.until:
            entry["until"] = step.until
        written.append(entry)
    return written
