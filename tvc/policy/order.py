"""Sites in their order: which comes first, runs of neighbours in words, the nearest of several."""

from __future__ import annotations

from collections.abc import Iterable

from tvc.policy.schema import COMPONENTS, SiteName, parse_site


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
