"""From what a compiled model kept to the panels of an overlay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvc.errors import InputError
from tvc.report.overlay import Panel
from tvc.report.patches import View


def panels(
    kept: Mapping[str, Sequence[int]],
    placeholders: Sequence[int],
    views: Sequence[View],
    merging: Mapping[str, bool] | None = None,
) -> list[Panel]:
    """One panel per site, in the order in which tokens pass them.

    Args:
        kept: site -> what stays of one sample, pads (-1) allowed: sequence positions for a decoder site, text included;
            indices of visual tokens elsewhere.
        placeholders: the sequence positions of the photo's visual tokens, ascending.
        views: where those tokens lie on the photo.
        merging: sites whose step merges what it does not keep; elsewhere it is dropped.

    Raises:
        InputError: a site kept a visual token that the photo does not have.
    """
    number = {position: index for index, position in enumerate(placeholders)}
    alive, merged, dropped = set(range(len(placeholders))), set[int](), set[int]()
    made = []
    for site in sorted(kept, key=_order):
        positions = [position for position in kept[site] if position >= 0]
        if site.startswith("language."):
            stays = {number[position] for position in positions if position in number}
        else:
            stays = set(positions)
        if not stays <= alive:
            raise InputError(
                "a site kept a visual token that had left before it",
                where=f"kept[{site!r}]",
                got=f"token {min(stays - alive)}",
                want=f"some of the {len(alive)} visual tokens that reach the site",
                fix="give the result of one call and the placeholders of the same prompt",
                slug="kept-out-of-range",
            )
        gone = alive - stays
        if merging is not None and merging.get(site):
            merged |= gone
        else:
            dropped |= gone
        alive = stays
        made.append(Panel(site, views, sorted(alive), sorted(merged), sorted(dropped)))
    return made


def _order(site: str) -> tuple[int, int]:
    component, _, index = site.partition(".")
    return ("vision", "projector", "language").index(component), int(index or 0)
