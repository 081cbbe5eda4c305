"""Of the values that rounding may make of merged tokens, those that the compiled model went on with.

Which of two almost equally near tokens is merged cannot be seen in what stays. But the next block caches values of the
tokens that enter it, each from that token alone. The same block of the untouched model, run on every decision that
rounding explains, tells which of them the compiled model made. What follows is then compared as closely as elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tvc.trace.layout import residual_argument
from tvc.trace.observe import plain_cache
from tvc.verification.entry import Entry
from tvc.verification.steps import Outcome

Values = Callable[[torch.Tensor], torch.Tensor]


def followed(
    hidden: torch.Tensor, outcomes: Sequence[Outcome], values_of: Values, theirs: torch.Tensor, slack: float
) -> tuple[torch.Tensor, bool]:
    """([B, S, D] the hidden states, with the values that come closest to `theirs`; whether the choices are settled).

    Sizes in `outcomes` go with the values. Choices are not settled where tokens differ that rounding may make something
    else of, and none of the decisions at hand does it: there are more than can be tried. Nor are they where such tokens
    have left the cache again.

    Args:
        hidden: behind the step.
        values_of: hidden states -> [B, H, S, d] the values that the next block caches of them.
        theirs: those that the compiled model cached, NaN where it holds none.
        slack: relative difference that needs no explanation.
    """
    unsure = [(one, open_to) for one in outcomes if one.drawn and bool((open_to := _unsure(one, slack, hidden)).any())]
    if not unsure:
        return hidden, True
    allowed = slack * max(1.0, float(theirs.nan_to_num().abs().max()))
    apart, hidden = _apart(values_of(hidden), theirs), hidden.clone()
    for number in range(len(unsure[0][0].drawn)):
        if all(bool((apart[one.sample.row, one.sample.slots] <= allowed).all()) for one, _ in unsure):
            break
        tried, sizes = hidden.clone(), []
        for one, _ in unsure:
            draw, row, slots = one.drawn[number], one.sample.row, one.sample.slots
            there = draw.stays[one.stayed]
            sizes.append(torch.where(there, draw.size[one.stayed], one.sample.size))
            if draw.feature is not None:
                values = draw.feature[one.stayed].to(hidden.dtype)
                tried[row, slots] = torch.where(there[:, None], values, hidden[row, slots])
        now = _apart(values_of(tried), theirs)
        for (one, _), size in zip(unsure, sizes, strict=True):
            row, slots = one.sample.row, one.sample.slots
            closer = (now[row, slots] < apart[row, slots]) & (apart[row, slots] > allowed)
            hidden[row, slots] = torch.where(closer[:, None], tried[row, slots], hidden[row, slots])
            apart[row, slots] = torch.where(closer, now[row, slots], apart[row, slots])
            one.sample = dataclasses.replace(one.sample, size=torch.where(closer, size, one.sample.size))
    told = ~theirs.isnan().all((1, 3))  # [B, S]
    if any(bool((open_to & ~told[one.sample.row, one.sample.slots]).any()) for one, open_to in unsure):
        return hidden, False
    left = [(apart[one.sample.row, one.sample.slots] > allowed, open_to) for one, open_to in unsure]
    return hidden, not any(bool(far.any()) for far, _ in left) or any(bool((far & ~to).any()) for far, to in left)


def layer_of(site: str) -> int:
    """The decoder block behind a site."""
    return int(site.removeprefix("language.")) if site != "projector" else 0


def cached_values(
    model: torch.nn.Module,
    site: str,
    block: torch.nn.Module,
    arguments: Mapping[str, Any],
    entry: Entry,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """[B, H, S, d] the values that the block behind `site` of the untouched model caches of what leaves the site."""
    cache = plain_cache(model)
    hidden = entry.hidden_of(hidden) if site == "projector" else hidden
    block.forward(**{**arguments, residual_argument(block): hidden, "past_key_values": cache})
    values: torch.Tensor = cache.layers[layer_of(site)].values
    return values


def _unsure(one: Outcome, slack: float, hidden: torch.Tensor) -> torch.Tensor:
    """[K] bool: of the tokens that stay, those that some decision makes something else of than rounding alone does."""
    own = hidden[one.sample.row, one.sample.slots].float()
    near, unsure = (
        4 * slack * own.abs().amax(1, keepdim=True),
        torch.zeros(len(own), dtype=torch.bool, device=own.device),
    )
    for draw in one.drawn:
        unsure |= ~draw.stays[one.stayed]
        if draw.feature is not None:
            unsure |= ((draw.feature[one.stayed].float() - own).abs() > near).any(1)
    return unsure


def _apart(values: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[B, S]: the largest difference of each token's values; 0 where there are none."""
    return (values.float() - theirs.float()).abs().nan_to_num(0.0).amax((1, 3))
