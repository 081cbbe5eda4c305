"""Follows a resolved policy through a model's token counts, and solves a policy's budgets for a target average."""

from __future__ import annotations

import dataclasses
import fractions
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvc.errors import ArgumentError
from tvc.kernels.budget import Budget
from tvc.kernels.op import Frames
from tvc.policy import Policy, resolve
from tvc.policy.budgets import scope_frames
from tvc.policy.options import Unrotated
from tvc.policy.whole import check_video
from tvc.program import Layout, spread
from tvc.report.cost import held, plan_costs, tile_lengths
from tvc.report.plan import Plan

_ORDER = {"vision": 0, "projector": 1, "language": 2}
_PARTS_OF = ("select", "rest", "merge")  # of a step: what holds numbers of tokens
_PARTS = 1_000_000  # resolution of the common factor: finer than a permille of the smallest share


@dataclasses.dataclass
class _Track:
    """The token counts while the steps are followed."""

    frames: Frames  # visual tokens of each frame of each image (inside the vision encoder of each tile)
    vision: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # block -> tokens per tile
    language: dict[int, int] = dataclasses.field(default_factory=dict)  # layer -> visual tokens from there on
    evicted: dict[int, int] = dataclasses.field(default_factory=dict)  # layer -> visual tokens that leave its cache
    cuts: list[tuple[int, Sequence[int]]] = dataclasses.field(
        default_factory=list
    )  # (layer, frames in caches from there)
    sites: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    exact: bool = True
    thinned: bool = False  # how many tokens each frame of a video still has depends on content
    decided_late: bool = False  # some count is settled at run time
    emptied: bool = False  # some budget rounded down to nothing
    alone: list[str] = dataclasses.field(default_factory=list)  # sites of steps on frames that find one in each scope

    @property
    def counts(self) -> list[int]:
        """Visual tokens of each image, or tile."""
        return [sum(image) for image in self.frames]


def make_plan(
    policy: Any, layout: Layout, text_tokens: int = 64, new_tokens: int = 1, *, vision_blocks: int | None = None
) -> Plan:
    """The plan of a resolved policy for one model and its sample images.

    Args:
        policy: a resolved policy: `name`, `attention`, `cache`, `reselect` and `steps`, each with `site`, `scope`,
            `select`, `rest`, `merge`, `exit`, `evict` and `until`.
        layout: the model.
        text_tokens: text tokens of the prompt.
        new_tokens: how many new tokens the decode cost is averaged over.
        vision_blocks: encoder blocks that the compiled graph runs, where some lie behind the features it takes.
    """
    most = _follow(policy.steps, layout, fires=False)
    plan = _priced(policy, layout, most, text_tokens, new_tokens, vision_blocks)
    if not most.decided_late and policy.cache is None:
        return plan
    least = _follow(policy.steps, layout, fires=True)
    fired = _priced(policy, layout, least, text_tokens, new_tokens, vision_blocks, fires=True)
    return dataclasses.replace(plan, fired=fired) if most.decided_late or fired != plan else plan


def plan_policy(
    policy: Policy,
    layout: Layout,
    text_tokens: int = 64,
    new_tokens: int = 1,
    *,
    average_tokens: float | None = None,
    vision_blocks: int | None = None,
) -> Plan:
    """The plan of a policy as it was written, its budgets solved for `average_tokens` where that is asked for.

    Raises:
        SiteError: the model cannot do what the policy says.
        ArgumentError: no budgets give that average.
    """
    resolved = resolve(policy, layout)
    if layout.frames > 1:
        check_video(resolved.steps)
    settings: dict[str, Any] = {}
    if average_tokens is not None:
        settings = solve_average(resolved, layout, average_tokens, text_tokens).settings
        resolved = resolve(policy.with_settings(settings), layout)
    plan = make_plan(resolved, layout, text_tokens, new_tokens, vision_blocks=vision_blocks)
    return dataclasses.replace(plan, settings=tuple(settings.items()))


def _priced(
    policy: Any,
    layout: Layout,
    track: _Track,
    text_tokens: int,
    new_tokens: int,
    blocks: int | None,
    fires: bool = False,
) -> Plan:
    counts, rule = _per_layer(track, layout), policy.reselect
    return plan_costs(
        layout,
        counts,
        text_tokens,
        track.vision,
        new_tokens,
        vision_blocks=layout.used_vision_blocks if blocks is None else blocks,
        policy=policy.name,
        sites=track.sites,
        exact=track.exact and not (policy.cache is not None and track.thinned),
        alone=_alone(policy, track),
        evicted=[
            track.evicted.get(index, 0) + _pooled(policy.cache, track, index, fires=fires)
            for index in range(len(layout.language))
        ],
        unread=[
            count - rule.keep.kept(count) if rule is not None and index >= rule.first else 0
            for index, count in enumerate(counts)
        ],
        products=3 if isinstance(policy.attention, Unrotated) else 2,
    )


def _alone(policy: Any, track: _Track) -> tuple[str, ...]:
    """What of a policy is about several frames, and finds one: sites, and the key of an option."""
    cache = ["cache"] if policy.cache is not None and len(track.cuts[0][1]) == 1 else []
    return (*dict.fromkeys(track.alone), *cache)


def _pooled(pool: Any, track: _Track, layer: int, *, fires: bool) -> int:
    """Visual tokens of a layer's cache for which others stand."""
    if pool is None:
        return 0
    frames = next(frames for first, frames in reversed(track.cuts) if first <= layer)
    return sum(frames) - int(pool.held(frames, fires))


def _per_layer(track: _Track, layout: Layout) -> list[int]:
    visual, counts = track.language[-1], []
    for index in range(len(layout.language)):
        visual = track.language.get(index, visual)
        counts.append(visual)
    return [visual for visual, _ in held(layout, counts, 0)]


def _place(site: object) -> tuple[str, int]:
    component, _, index = str(site).partition(".")
    return component, int(index) if index else 0


def _in_order(steps: Sequence[Any]) -> list[Any]:
    """Steps as a visual token meets them; steps at one site keep their order."""
    return sorted(steps, key=lambda step: (_ORDER[_place(step.site)[0]], _place(step.site)[1]))


def _follow(steps: Sequence[Any], layout: Layout, *, fires: bool) -> _Track:
    """The counts after each step; `fires`: decisions made at run time remove all they can, else nothing."""
    lengths = tile_lengths(layout)
    track = _Track([[(length - layout.prefix_tokens) // layout.group] for length in lengths])
    ordered = _in_order(steps)
    for step in (s for s in ordered if _place(s.site)[0] == "vision"):
        _apply(step, track, fires=fires)
        kept = [layout.prefix_tokens + layout.group * count for count in track.counts]
        track.vision[_place(step.site)[1]] = kept
    track.frames = _images(track.counts, layout) if track.vision else layout.frame_tokens
    for step in (s for s in ordered if _place(s.site)[0] == "projector"):
        _apply(step, track, fires=fires)
        track.sites[0] = (*track.sites.get(0, ()), str(step.site))
    track.language[-1] = sum(track.counts)
    track.cuts.append((0, scope_frames("sequence", track.frames)[0]))
    for step in (s for s in ordered if _place(s.site)[0] == "language"):
        before, exact, thinned = track.frames, track.exact, track.thinned
        index, entering = _place(step.site)[1], sum(track.counts)
        _apply(step, track, fires=fires)
        track.language[index] = sum(track.counts)
        held_from = _place(step.evict)[1] if step.evict else index
        track.cuts.append((held_from, scope_frames("sequence", track.frames)[0]))
        for layer in range(_place(step.evict)[1], index) if step.evict else ():
            track.evicted[layer] = track.evicted.get(layer, 0) + entering - sum(track.counts)
        if step.until:  # a later step at that layer goes on from there
            track.frames, track.exact, track.thinned = before, exact, thinned
            track.language[_place(step.until)[1]] = entering
        name = str(step.site)
        track.sites[index] = tuple(dict.fromkeys((*track.sites.get(index, ()), name)))
    return track


def _images(tiles: list[int], layout: Layout) -> list[list[int]]:
    """Visual tokens per image after cuts in the vision encoder, which count per tile; tiles go to images in order."""
    share = len(tiles) // len(layout.visual_tokens)
    return [[sum(tiles[i * share : (i + 1) * share])] for i in range(len(layout.visual_tokens))]


def _apply(step: Any, track: _Track, *, fires: bool) -> None:
    frames = scope_frames(step.scope, track.frames)
    entering = [sum(scope) for scope in frames]
    left = list(entering)
    if _works_on_frames(step) and all(len(scope) == 1 for scope in frames):
        track.alone.append(str(step.site))
    if step.merge is not None:
        track.decided_late |= not step.merge.sure
        fewest = fires and not step.merge.sure
        left = list(step.merge.fewest(entering) if fewest else step.merge.kept_of_frames(frames))
    if step.select is not None:
        chosen = list(step.select.kept_of_frames(frames))
        track.emptied |= any(before and not after for before, after in zip(entering, chosen, strict=True))
        if not step.select.sure:
            track.decided_late = True
            chosen = [0] * len(chosen) if fires else chosen
        left = chosen
        if step.rest is not None:
            track.decided_late |= not step.rest.exact
            left = chosen if fires and not step.rest.exact else list(step.rest.kept_of_frames(frames, chosen))
    if step.exit is not None:
        always = step.exit.gate.key == "always"
        track.decided_late |= not always
        left = [0] * len(left) if always or fires else left
    _settle(left, frames, track)


def _settle(left: Sequence[int], frames: Frames, track: _Track) -> None:
    """What a step left of its scopes, handed back to images and frames in proportion: how it is truly split is known
    only for a single one.
    """
    parts = [count for total, scope in zip(left, frames, strict=True) for count in spread(total, scope)]
    split = [scope for total, scope in zip(left, frames, strict=True) if total not in (0, sum(scope))]
    track.thinned |= any(sum(count > 0 for count in scope) > 1 for scope in split)
    shared = len(frames) < len(track.frames) and bool(split)
    track.exact &= not (shared and sum(count > 0 for count in track.counts) > 1)
    lengths, made = [len(image) for image in track.frames], []
    for length in lengths:
        made.append(parts[:length])
        parts = parts[length:]
    track.frames = made


def _works_on_frames(step: Any) -> bool:
    """Whether a step's own choice or merge, beside its scores, is about the frames of a video."""
    parts = (part for part in (step.select, step.rest, step.merge) if part is not None)
    return any(tap.kind == "frame" for part in parts for tap in part.taps().values())


def _budgets(select: Any) -> Iterator[Budget]:
    for name in type(select).model_fields:
        value = getattr(select, name)
        if isinstance(value, Budget):
            yield value


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """What of a resolved policy a plan needs, with other budgets."""

    name: str
    steps: tuple[Any, ...]
    reselect: Any
    attention: Any
    cache: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Budgets that meet a goal: `settings` for `Policy.with_settings`, and the plan they give."""

    settings: dict[str, Any]
    plan: Plan

    @property
    def average(self) -> float:
        return self.plan.average_visual_tokens


def solve_average(
    policy: Any,
    layout: Layout,
    target: float,
    text_tokens: int = 64,
    *,
    vision_blocks: int | None = None,
    where: str = "--average-tokens",
) -> Schedule:
    """Scales all budgets of a resolved policy by one factor, so that the decoder's layers hold `target` visual tokens.

    Args:
        where: what the target was given as, for refusals.

    Returns:
        A setting for each budget (`steps.0.select.top.keep=12.5%`) and the plan they give: the largest mean over the
        decoder's layers that does not exceed the target.

    Raises:
        ArgumentError: no factor meets the target, or the policy has no budget to scale.
    """

    def average(steps: Sequence[Any]) -> float:
        return sum(_per_layer(_follow(steps, layout, fires=False), layout)) / len(layout.language)

    goal = _Goal(average, target, f"an average of {target:g} visual tokens", "visual tokens a layer", where)
    return _solve(policy, layout, goal, text_tokens, vision_blocks)


def solve_kept(
    policy: Any, layout: Layout, target: float, text_tokens: int = 64, *, vision_blocks: int | None = None
) -> Schedule:
    """Scales all budgets of a resolved policy by one factor, so that `target` visual tokens are left behind its cuts.

    Exits do not count: they leave none.

    Returns:
        A setting for each budget and the plan they give: the largest number that does not exceed the target.

    Raises:
        ArgumentError: no factor meets the target, or the policy has no budget to scale.
    """

    def left(steps: Sequence[Any]) -> float:
        return sum(_follow([step for step in steps if step.exit is None], layout, fires=False).counts)

    goal = _Goal(left, target, f"{target:g} visual tokens behind its last cut", "visual tokens", "--budgets")
    return _solve(policy, layout, goal, text_tokens, vision_blocks)


@dataclasses.dataclass(frozen=True)
class _Goal:
    """A number of a policy's steps that rises with their budgets, and what it shall be."""

    measure: Callable[[Sequence[Any]], float]
    target: float
    wish: str
    unit: str
    where: str


def _solve(policy: Any, layout: Layout, goal: _Goal, text_tokens: int, vision_blocks: int | None) -> Schedule:
    """As the measure rises with the factor, bisection over whole numbers finds the largest that fits."""
    budgets = [b for step in policy.steps for p in (step.select, step.merge) if p is not None for b in _budgets(p)]
    if not budgets:
        raise _refused(
            policy,
            goal,
            "a policy without budgets",
            "a policy with a `keep`",
            "give a policy that selects or merges a share; others run as they are written, without a budget",
        )

    def scaled(factor: int) -> _Scaled:
        steps = tuple(_scaled_step(step, factor) for step in policy.steps)
        return _Scaled(policy.name, steps, policy.reselect, policy.attention, policy.cache)

    def measure(factor: int) -> float:
        return goal.measure(scaled(factor).steps)

    total = max(sum(layout.visual_tokens), max(tile_lengths(layout)))
    smallest = [(b.share.parts, b.share.whole) if b.share else (b.count or 1, total) for b in budgets]
    most = max(-(-_PARTS * whole // parts) for parts, whole in smallest)
    least = _largest(lambda f: _follow(scaled(f).steps, layout, fires=False).emptied, most)
    least += _follow(scaled(least).steps, layout, fires=False).emptied
    lowest, highest = measure(least), measure(most)
    if not lowest <= goal.target <= highest:
        raise _refused(
            policy,
            goal,
            f"{goal.target:g}",
            f"{lowest:.1f} to {highest:.1f} {goal.unit}: what its cuts can reach in this model",
            "move the cuts to earlier layers for a smaller number, or choose one in that range",
        )
    best = measure(_largest(lambda f: measure(f) <= goal.target, most))
    # Of all factors with that measure the smallest: 50% rather than a 50.1% that rounds to as many tokens.
    factor = 0 if measure(0) == best else _largest(lambda f: measure(f) < best, most) + 1
    chosen = scaled(factor)
    plan = make_plan(chosen, layout, text_tokens, vision_blocks=vision_blocks)
    # A step that was written for a range of sites has its settings once.
    found = dict(_settings(policy.steps, chosen.steps))
    return Schedule(found, dataclasses.replace(plan, settings=tuple(found.items())))


def _refused(policy: Any, goal: _Goal, got: str, want: str, fix: str) -> ArgumentError:
    return ArgumentError(
        f"no budgets of policy {policy.name} give {goal.wish}",
        where=goal.where,
        got=got,
        want=want,
        fix=fix,
        slug="unreachable-average" if goal.where == "--average-tokens" else "unreachable-budget",
    )


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number in 0..most for which `holds`, which never becomes true again once false; 0 if it never is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _scaled_step(step: Any, factor: int) -> Any:
    """A step with every number of tokens that it keeps times `factor` / `_PARTS`."""
    times = fractions.Fraction(factor, _PARTS)
    parts = {name: part.scaled(times) for name in _PARTS_OF if (part := getattr(step, name)) is not None}
    return dataclasses.replace(step, **parts)


def _settings(steps: Sequence[Any], scaled: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Every budget of the scaled steps, and what else differs from the steps as they were."""
    for before, after in zip(steps, scaled, strict=True):
        for part in _PARTS_OF:
            old, new = getattr(before, part), getattr(after, part)
            if new is None:
                continue
            always = {name for name in type(new).model_fields if isinstance(getattr(new, name), Budget)}
            for name, value in new.model_dump(mode="json").items():
                place = f"steps.{before.number}.{part}.{new.key}.{name}"
                if name in always:
                    yield place, value
                else:
                    yield from _leaves(place, old.model_dump(mode="json")[name], value)


def _leaves(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any]]:
    """The values below a place that changed, each by its own path."""
    if isinstance(new, dict) and isinstance(old, dict):
        for name, value in new.items():
            yield from _leaves(f"{place}.{name}", old.get(name), value)
    elif new != old:
        yield place, new
