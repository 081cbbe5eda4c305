"""Sites in their order: which comes first, runs of neighbours in words, the nearest of several, steps out of order."""

from __future__ import annotations

from collections.abc import Iterable

from tvc.policy.schema import COMPONENTS, Policy, SiteName, Step, parse_site
from tvc.policy.whole import refusal


def rank(site: SiteName) -> tuple[int, int]:
    """Sites in the order in which tokens pass them."""
    return COMPONENTS.index(site.component), site.index or 0


def behind(one: SiteName, two: SiteName) -> bool:
    """Whether the first site comes after the second in every model; both are of one component."""
    comparable = one.index is not None and two.index is not None and one.percent == two.percent
    signs = comparable and ((one.index or 0) < 0) == ((two.index or 0) < 0)
    return signs and (one.index or 0) > (two.index or 0)


def ranges(names: Iterable[str]) -> str:
    """`language.0..3, projector` for a list of site names."""
    by_component: dict[str, list[int]] = {}
    for name in names:
        site = parse_site(name)
        if site is not None:
            by_component.setdefault(site.component, []).append(site.index if site.index is not None else -1)
    texts = []
    for component in COMPONENTS:
        numbers = sorted(by_component.get(component, []))
        while numbers:
            run = next((i for i, n in enumerate(numbers) if n != numbers[0] + i), len(numbers))
            first, last, numbers = numbers[0], numbers[run - 1], numbers[run:]
            texts.append(component if first < 0 else f"{component}.{first}" + (f"..{last}" if last > first else ""))
    return ", ".join(texts) or "no site at all"


def closest(site: SiteName, legal: list[str]) -> str:
    """The legal site nearest to `site`, a later one before an earlier one."""

    def distance(name: str) -> tuple[int, bool, int]:
        other = parse_site(name)
        component, index = rank(other) if other is not None else (len(COMPONENTS), 0)
        wanted, place = rank(site)
        return abs(component - wanted), component < wanted, abs(index - place)

    return min(legal, key=distance, default="language.0")


def check_order(policy: Policy, steps: tuple[Step, ...]) -> None:
    """Refuses sites that coincide, or come out of order, once the model says what they are."""
    for number in range(1, len(steps)):
        before, step = steps[number - 1], steps[number]
        if rank(step.site) > rank(before.site):
            continue
        same, one, other = step.at == before.at, before.number, step.number
        written = f"{policy.steps[one].at} and {policy.steps[other].at} mean {before.at} and {step.at}"
        raise refusal(
            policy,
            ("steps", other, "at"),
            f"steps {one} and {other} act at the same site of this model"
            if same
            else f"step {other} acts before step {one} in this model",
            got=written,
            want="one step per site, in the order in which tokens pass them",
            fix="move one of them to another layer, or remove it" if same else "swap the two steps",
            slug="same-site" if same else "step-order",
        )


def check_behind_cuts(policy: Policy, steps: tuple[Step, ...]) -> None:
    """Refuses queries and keys of a decoder layer in front of an earlier cut: they are of tokens that have left."""
    cut = None
    for step in steps:
        if step.site.component != "language":
            continue
        taps = [tap for primitive in step.primitives() for tap in primitive.taps().values()]
        for tap in taps:
            layer = parse_site(tap.layer or "") if tap.kind in ("attention", "key") else None
            if cut is None or layer is None or layer.component != "language" or rank(layer) >= rank(cut.site):
                continue
            raise refusal(
                policy,
                ("steps", step.number),
                f"{layer} runs in front of {cut.at}, where another step has removed tokens",
                got=f"layer: {layer} at {step.at}",
                want=f"a layer from {cut.at} on, or one of the vision encoder",
                fix="act later, so that a layer with attention lies between the steps; or score by something else",
                slug="layer-before-a-cut",
            )
        cut = cut if step.until else step
