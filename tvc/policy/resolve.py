"""Policy x Layout -> ResolvedPolicy: real layers for negative and relative ones, one choice for each list of choices.

What a policy leaves to the model is decided here, once, and written out: `vision.-2` becomes `vision.22`, `previous`
becomes `language.1`, `of: [cls, all]` becomes what the encoder has, and an average becomes counts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvc.kernels.op import Primitive, Tap
from tvc.policy.budgets import check_nothing_emptied, with_averages, with_spreads
from tvc.policy.bypass import check_bypasses
from tvc.policy.bypass import settled as returning
from tvc.policy.document import Path, from_data
from tvc.policy.evictions import check_evictions, start
from tvc.policy.evictions import settled as evicted
from tvc.policy.memory import check_memories
from tvc.policy.options import Chunks, Pool, Unrotated, check_options, options_data
from tvc.policy.order import check_behind_cuts, check_order, closest, ranges, rank
from tvc.policy.positions import Positions, check_positions, positions_data
from tvc.policy.reselection import Reselect
from tvc.policy.reselection import settled as reselected
from tvc.policy.schema import (
    Policy,
    SiteName,
    Span,
    Step,
    WeightedScore,
    dump_yaml,
    parse_site,
    parse_sites,
    reselect_data,
    steps_data,
)
from tvc.policy.unrotated import check_unrotated
from tvc.policy.weights import settled
from tvc.policy.whole import check_frames, check_pixels, check_scope, check_sizes, refusal, with_columns, with_depth
from tvc.program import Layout


@dataclasses.dataclass(frozen=True)
class ResolvedPolicy:
    """What a policy means for one model: `policy` says it as a policy of its own, `original` is what was asked."""

    policy: Policy
    original: Policy

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps with concrete sites (`language.2`) and layers, in pipeline order."""
        return self.policy.steps

    @property
    def positions(self) -> Positions:
        return self.policy.positions

    @property
    def reselect(self) -> Reselect | None:
        return self.policy.reselect

    @property
    def attention(self) -> Chunks | Unrotated | None:
        return self.policy.attention

    @property
    def cache(self) -> Pool | None:
        return self.policy.cache

    def to_yaml(self) -> str:
        """The resolved policy with every default written out; it loads as a policy of its own."""
        return dump_yaml(self.policy.document.data)

    def digest(self) -> str:
        return self.policy.digest()


def resolve(policy: Policy, layout: Layout) -> ResolvedPolicy:
    """The policy for this model and the images of its sample.

    Raises:
        SiteError: a layer or a tap that the model lacks, a cut without meaning, a budget that keeps nothing.
    """
    sites = [step.at for step in policy.steps]
    check_positions(policy.document, policy.positions, sites, layout)
    check_options(policy.document, policy.options, sites, layout)
    steps = tuple(
        _step(policy, layout, number, one)
        for number, step in enumerate(policy.steps)
        for one in _each_site(policy, layout, number, step)
    )
    check_order(policy, steps)
    check_bypasses(policy, steps)
    check_behind_cuts(policy, steps)
    check_evictions(policy, steps)
    check_memories(policy, steps)
    check_unrotated(policy, steps, layout)
    steps = with_averages(policy, with_spreads(steps, layout), layout)
    check_nothing_emptied(policy, steps, layout)
    rule = reselected(policy, layout, steps, lambda path, name: _concrete(policy, layout, path, name))
    data: dict[str, Any] = {"version": policy.version, "name": policy.name}
    data |= {key: value for key in ("about", "reference", "covers") if (value := getattr(policy, key))}
    data |= {key: list(value) for key in ("deviations", "unverified") if (value := getattr(policy, key))}
    data |= {"measure": policy.measure} if policy.measure != "last" else {}
    data |= {"steps": steps_data(steps)} if steps else {}
    data |= {"positions": positions_data(policy.positions), **options_data(policy.options)}
    data |= {"reselect": reselect_data(rule)} if rule is not None else {}
    document = from_data(data, f"resolved {policy.name}")
    changes: dict[str, Any] = {"steps": steps, "reselect": rule, "document": document}
    return ResolvedPolicy(dataclasses.replace(policy, parameters={}, budgets={}, **changes), policy)


def _blocks(layout: Layout, component: str) -> int:
    return len(layout.vision if component == "vision" else layout.language)


def _each_site(policy: Policy, layout: Layout, number: int, step: Step) -> list[Step]:
    """The step at every site of the range that it was written for; itself where that is no range."""
    span, path = parse_sites(step.at), ("steps", number, "at")
    if span is None:
        return [step]
    numbers, written = _range(policy, layout, path, span), policy.document.get(path)
    whole = step.until or not any("columns" in type(primitive).model_fields for primitive in step.primitives())
    if not whole and len(numbers) > 1:
        raise refusal(
            policy,
            path,
            "a step works on the rows of an image, and acts at several sites, of which the first leaves gaps in them",
            got=written,
            want="one site",
            fix=f"write at: {span.first}",
            slug="broken-grid",
        )
    if step.exit is not None and step.exit.gate.key == "always" and len(numbers) > 1:
        raise refusal(
            policy,
            path,
            "an exit that always happens can only happen once",
            got=written,
            want="one site",
            fix=f"write at: {span.first}",
            slug="unreachable-step",
        )
    return [dataclasses.replace(step, at=f"{span.first.component}.{block}") for block in numbers]


def _range(policy: Policy, layout: Layout, path: Path, span: Span) -> range:
    """The blocks of a range, both ends inside; of `all`, those that the visual features depend on."""
    first, last = (_concrete(policy, layout, path, end) for end in (span.first, span.last))
    if span.every and first.component == "vision" and layout.used_vision_blocks:
        last = SiteName("vision", layout.used_vision_blocks - 1)
    numbers = range(first.index or 0, (last.index or 0) + 1, span.stride)
    if not numbers:
        raise refusal(
            policy,
            path,
            "the range of layers holds none in this model",
            got=f"{span}, which is {first} to {last} of {_blocks(layout, first.component)} blocks",
            want="a first layer that does not come after the last",
            fix=f"write {last}..{first.index}",
            slug="empty-range",
        )
    return numbers


def _step(policy: Policy, layout: Layout, number: int, step: Step) -> Step:
    path: Path = ("steps", number)
    site = _concrete(policy, layout, (*path, "at"), step.site)
    known = layout.site(str(site))
    if known is None or not known.legal:
        legal = [s.name for s in layout.sites if s.legal]
        raise refusal(
            policy,
            (*path, "at"),
            f"{layout.model_type} can't be cut at {site}",
            got=f"{site}: {known.reason}" if known else f"{site}, which this model does not have",
            want=f"one of {ranges(legal)}",
            fix=f"write at: {closest(site, legal)}",
            slug="illegal-site",
        )

    def scores(given: tuple[WeightedScore, ...], here: Path, listed: bool) -> tuple[WeightedScore, ...]:
        return tuple(
            dataclasses.replace(
                score,
                primitive=_taps(policy, layout, site, (*here, i) if listed else here, primitive),
            )
            for i, score in enumerate(given)
            for primitive in _each_layer(policy, layout, (*here, i) if listed else here, score.primitive)
        )

    resolved: dict[str, Any] = {
        "score": scores(step.score, (*path, "score"), isinstance(policy.document.get((*path, "score")), list))
    }
    for key in ("select", "rest", "merge"):
        primitive = getattr(step, key)
        resolved[key] = None if primitive is None else _taps(policy, layout, site, (*path, key), primitive)
    if step.exit is not None:
        when = (*path, "exit", "when")
        resolved["exit"] = dataclasses.replace(
            step.exit,
            gate=_taps(policy, layout, site, when, step.exit.gate),
            score=scores(step.exit.score, (*when, "score"), isinstance(policy.document.get((*when, "score")), list)),
        )
    if step.evict:
        resolved["evict"] = evicted(policy, path, step, site, _concrete(policy, layout, (*path, "evict"), start(step)))
    if step.until:
        end = parse_site(step.until)
        named = None if end is None else _concrete(policy, layout, (*path, "until"), end)
        resolved["until"] = returning(policy, layout, path, step, site, named)
    check_sizes(policy, path, resolved["merge"], site)
    check_scope(policy, path, step, site)
    select = resolved["select"]
    if select is not None and select.terms and len(resolved["score"]) != select.terms:
        raise refusal(
            policy,
            (*path, "score"),
            f"`{select.key}` takes {select.terms} score terms, each for a purpose of its own",
            got=f"{len(resolved['score'])} terms",
            want=f"a list of {select.terms} terms with one layer each",
            fix=f"tvc policies show lists a preset with select: {select.key}",
            slug="score-terms",
        )
    return dataclasses.replace(step, at=str(site), **resolved)


def _each_layer(policy: Policy, layout: Layout, path: Path, primitive: Primitive) -> list[Primitive]:
    """The primitive for every layer of the range that its `layer` names; itself where that is no range."""
    written = getattr(primitive, "layer", None)
    span = parse_sites(written) if isinstance(written, str) else None
    if span is None:
        return [primitive]
    numbers = _range(policy, layout, (*path, primitive.key, "layer"), span)
    return [primitive.model_copy(update={"layer": f"{span.first.component}.{number}"}) for number in numbers]


def _concrete(policy: Policy, layout: Layout, path: Path, name: SiteName) -> SiteName:
    """The site with a block number that exists: negatives count back, percentages are shares of the depth."""
    if name.index is None:
        return name
    blocks = _blocks(layout, name.component)
    index = blocks * name.index // 100 if name.percent else name.index + blocks * (name.index < 0)
    if 0 <= index < blocks:
        return SiteName(name.component, index)
    raise refusal(
        policy,
        path,
        "the policy names a layer that the model does not have",
        got=name,
        want=f"{name.component}.0..{name.component}.{blocks - 1} ({layout.model_type} has {blocks} {name.component} "
        f"blocks), or -{blocks}..-1 from the end"
        if blocks
        else f"another component: {layout.model_type} has no {name.component} blocks",
        fix=(
            f"write {name.component}.0 for the first block"
            if name.index < 0
            else f"write {name.component}.{blocks - 1} for the last block"
        )
        if blocks
        else "name another component",
        slug="unknown-layer",
    )


# Taps -----------------------------------------------------------------------------------------------------------------


def _taps(policy: Policy, layout: Layout, site: SiteName, path: Path, primitive: Primitive) -> Any:
    """The primitive with its `layer` concrete and its `of` decided."""
    here: Path = (*path, primitive.key)
    changes = with_columns(policy, layout, site, here, primitive) | _since(policy, layout, site, here, primitive)
    changes |= settled(policy, int(path[1]), site, primitive) | with_depth(policy, layout, site, here, primitive)
    for tap in primitive.taps().values():
        layer = _layer(policy, layout, site, (*here, "layer"), primitive, tap)
        if layer is not None and layer.component not in primitive.components:
            raise refusal(
                policy,
                (*here, "layer"),
                f"`{primitive.key}` is defined for layers of the decoder alone",
                got=f"{layer} at {site}",
                want="a language site, and a layer of the decoder",
                fix="write at: language.2, and layer: previous",
                slug="decoder-only",
            )
        crossed = any(block.crosses for block in layout.language)
        if layer is not None and layer.component == "vision" and layout.apart:
            raise refusal(
                policy,
                (*here, "layer"),
                f"the vision encoder of {layout.model_type} stays the model's own code, which no score sees into"
                if layout.untraced
                else f"the vision encoder of {layout.model_type} has no value that could be taken for a visual token",
                got=f"{layer}: {layout.apart}",
                want="features alone" if crossed else "a layer of the decoder",
                fix="score features (norm, random) or choose among them (greedy)"
                if crossed
                else "write at: language.2, and layer: previous",
                slug="untraced-vision" if layout.untraced else "resampled-vision",
            )
        blind = layer is not None and layer.component == "language" and not layout.language[layer.index or 0].heads
        if layer is not None and blind and tap.kind in ("attention", "key"):
            raise refusal(
                policy,
                (*here, "layer"),
                f"{layer} has no attention: it mixes tokens by a convolution",
                got=f"layer: {getattr(primitive, 'layer', None) or layer} at {site}",
                want=f"one of {ranges(f'language.{i}' for i, one in enumerate(layout.language) if one.heads)}",
                fix="name a layer with attention that runs before the step",
                slug="no-attention",
            )
        if layer is not None and "layer" in type(primitive).model_fields:
            changes["layer"] = str(layer)
        if tap.kind == "text" and (layer or site).component != "language":
            raise refusal(
                policy,
                here,
                f"there is no text at {layer or site}: text meets the visual tokens in the decoder",
                got=f"{primitive.key} at {site}",
                want="a language site, or a score that needs no text",
                fix="write at: language.0",
                slug="no-text",
            )
        _check_heads(policy, site, here, primitive, tap, layer)
        if tap.kind == "frame":
            check_frames(policy, site, here, primitive)
        if tap.kind == "pixel":
            check_pixels(policy, layout, site, here, primitive)
        if tap.kind == "attention" and layer is not None:
            rows = _rows(policy, layout, (*here, "of"), layer, tap.of)
            if "of" in type(primitive).model_fields:
                changes["of"] = rows
    made = primitive.model_copy(update=changes)
    if "since" in changes and not made.taps():
        raise refusal(
            policy,
            (*here, "since"),
            f"`{primitive.key}` sums over no layer",
            got=f"since: {changes['since']}, and the last layer is {getattr(made, 'layer', '')}",
            want="a last layer that is not in front of the first",
            fix="write an earlier site behind since, or a later layer",
            slug="empty-range",
        )
    return made


def _check_heads(
    policy: Policy, site: SiteName, path: Path, primitive: Primitive, tap: Tap, layer: SiteName | None
) -> None:
    """Refuses queries and keys in a form that the layer does not give."""
    if not tap.rotary and layer is not None and layer != site:
        raise refusal(
            policy,
            (*path, "layer"),
            f"`{primitive.key}` takes queries and keys before positions turn them, of the layer that runs next",
            got=f"layer: {layer} at {site}",
            want="layer: self",
            fix="write layer: self",
            slug="turned-layer",
        )
    if tap.kind == "key" and "joined" in tap.of and layer is not None and layer.component == "vision":
        raise refusal(
            policy,
            (*path, "heads"),
            "keys of all heads side by side are had of decoder layers alone",
            got=f"heads: joined of {layer}",
            want="heads: mean, or a layer of the decoder",
            fix="write heads: mean",
            slug="decoder-only",
        )


def _since(policy: Policy, layout: Layout, site: SiteName, path: Path, primitive: Primitive) -> dict[str, Any]:
    """The site that a sum over layers starts at: the step's own, where none is written."""
    if "since" not in type(primitive).model_fields:
        return {}
    written = getattr(primitive, "since", None)
    named = site if written is None else parse_site(written)
    since = None if named is None or named.index is None else _concrete(policy, layout, (*path, "since"), named)
    if since is None or since.component != "language" or not since.index or rank(since) > rank(site):
        raise refusal(
            policy,
            (*path, "since") if written else path,
            f"`{primitive.key}` sums over decoder layers that run before its step",
            got=f"since: {written or site} at {site}",
            want="a language site, at the step's or before it, and not the first one",
            fix="act at a later site: at: language.2",
            slug="no-layer",
        )
    return {"since": str(since)}


def _layer(
    policy: Policy, layout: Layout, site: SiteName, path: Path, primitive: Primitive, tap: Tap
) -> SiteName | None:
    """The layer a tap is taken from, or None where it is the site's own value."""
    if tap.kind in ("ordinal", "weights", "spent") or (tap.layer is None and tap.kind != "key"):
        return None
    written = tap.layer or "self"
    if written in ("self", "previous"):
        back = written == "previous"
        if site.index is None or site.index < back:
            # A depth such as 12% is the first layer of a shallow model; no encoder has text that could rate instead.
            rated = back and tap.kind != "key" and site.component == "language" and not {"all", "cls"} & set(tap.of)
            raise refusal(
                policy,
                path,
                f"no layer runs before {site}" if back else f"{site} has no layer of its own",
                got=f"layer: {written} at {site}",
                want="a vision layer" + (", or a later site" if back else ""),
                fix="act at a later site: at: language.1" if rated else "name one: layer: vision.-2",
                slug="no-layer",
            )
        if tap.kind == "transition" and not back:
            raise refusal(
                policy,
                path,
                "what a layer does to a token is known behind that layer only",
                got=f"layer: {written} at {site}",
                want="previous, or an earlier layer of the decoder",
                fix="write layer: previous",
                slug="later-layer",
            )
        index = site.index - back
        if back and tap.kind in ("attention", "key") and site.component == "language":
            # Of layers that mix tokens by convolutions, the last one with attention before them is meant.
            index = next((i for i in range(index, -1, -1) if layout.language[i].heads), index)
        return SiteName(site.component, index)
    named = parse_site(written)
    if named is None or (named.index is None and tap.kind != "feature"):
        raise refusal(
            policy,
            path,
            f"`{primitive.key}` names no layer",
            got=written,
            want="previous, self, language.K or vision.K" if tap.kind != "feature" else "vision.K or language.K",
            fix="write layer: previous" if tap.kind == "attention" else "write layer: vision.-2",
            slug="bad-layer-name",
        )
    layer = _concrete(policy, layout, path, named)
    if rank(layer) > rank(site) or (tap.kind == "transition" and rank(layer) >= rank(site)):
        raise refusal(
            policy,
            path,
            f"{layer} runs after {site}, so nothing of it is known there",
            got=f"layer: {written} at {site}",
            want=f"{site} or an earlier layer",
            fix="write layer: previous" if site.index else "name a vision layer: layer: vision.-2",
            slug="later-layer",
        )
    return layer


def _rows(policy: Policy, layout: Layout, path: Path, layer: SiteName, choices: tuple[str, ...]) -> str:
    """The first of the choices whose rows exist in this layer's attention."""
    in_decoder = layer.component == "language"
    for choice in choices:
        if choice == "cls":
            possible = not in_decoder and layout.prefix_tokens > 0
        elif choice in ("last", "text", "raters"):
            possible = in_decoder
        else:
            possible = True
        if possible:
            return choice
    if "cls" in choices and not in_decoder:
        summary = f"the vision encoder of {layout.model_type} has no CLS token to take attention from"
        want = "of: all or of: visual in a vision layer; of: last or of: text in a decoder layer"
        fix = f"write of: all, or of: [cls, all], with layer: {layer}; or act at language.2 with of: last"
    elif in_decoder:
        summary, want = (
            f"{layer} has no CLS token: that is one of the vision encoder's",
            "of: last, text, raters, visual or all",
        )
        fix = "write of: last, or layer: vision.-2"
    else:
        summary, want = f"{layer} sees no text, so nothing of it can score there", "of: all, visual or cls"
        fix = "write of: all, or take a decoder layer: layer: previous at language.2"
    raise refusal(
        policy,
        path,
        summary,
        got=f"of: {', '.join(choices)}, layer: {layer}",
        want=want,
        fix=fix,
        slug="no-cls" if "cls" in choices else "no-text",
    )
