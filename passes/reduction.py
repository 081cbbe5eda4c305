"""What a policy step computes, as plain functions over tensors.

The same lines run while a graph is traced and, eagerly, wherever a step is to be carried out by hand.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tvc.kernels.combine_scores import combine
from tvc.kernels.exit_select import exit_chosen
from tvc.kernels.op import Attention, Scope
from tvc.kernels.peaks import histogram
from tvc.kernels.segments import or_pad

# More scopes than any chunk holds: ceil(n / MANY) is 0 where there is none and 1 otherwise, without a branch.
MANY = 1 << 30


@dataclasses.dataclass
class Decision:
    """A step's answer: `chosen` [B, K] into the visual tokens that entered; merged values where the step merges."""

    chosen: torch.Tensor
    feature: torch.Tensor | None
    size: torch.Tensor


def scope_of(name: str, segment: torch.Tensor, counts: torch.Tensor, frames: tuple[torch.Tensor, ...] = ()) -> Scope:
    """`image`: every image or video has its own budget; `frame`: every frame; `sequence`: the sample's visual tokens
    share one.

    `frames`: for `frame`, first of them [B, V] the frame of each token, counted through the sample.
    """
    number = counts.shape[1]
    if name == "image":
        return Scope(segment, counts, number)
    if name == "frame":
        frame = torch.where(segment >= 0, frames[0], -1)
        # One more column keeps the largest number defined for V = 0.
        many: int = torch.nn.functional.pad(frame + 1, (0, 1)).max().item()  # type: ignore[assignment]
        torch._check(many >= 0)
        return Scope(frame, histogram(frame, many), many)
    shared = torch.where(segment >= 0, 0, -1)
    return Scope(shared, counts.sum(1, keepdim=True), (number + MANY - 1) // MANY)


def decide(
    step: Any,
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    scores: list[torch.Tensor | dict[str, Any]],
    taps: dict[str, dict[str, Any]],
    whole: bool = False,
) -> Decision:
    """Carries out one policy step.

    Args:
        step: a resolved step (score, select, rest, merge, exit, scope).
        feature: [B, V, D] the visual tokens; size: [B, V] float, originals per token.
        segment: [B, V] int64 image of each token, -1 pads; counts: [B, N] int64 tokens per image.
        scores: for each score term its taps, or the score itself [B, V] where another component computed it.
        taps: taps of `select`, `rest`, `merge` and `when` by argument name; of `scope: frame` its `frames`.
        whole: every token is real, and all are of one image.
    """
    scope = scope_of(step.scope, segment, counts, taps.get("scope", {}).get("frames", ()))
    if step.merge is not None:
        scope = dataclasses.replace(scope, whole=whole)
        return Decision(*step.merge.apply(feature, size, scope, **_bundles(taps.get("merge", {}))))
    terms = step.exit.score if step.exit is not None else step.score
    score = None
    if terms:
        values = [
            (
                given if isinstance(given, torch.Tensor) else one_score(term.primitive, _bundles(given), scope),
                term.weight,
                term.normalize,
            )
            for term, given in zip(terms, scores, strict=True)
        ]
        if step.exit is None and step.select.terms:
            apart = [combine([value], segment) for value in values]
            score = step.select.joined(apart, scope, **_bundles(taps.get("select", {})))
        else:
            score = combine(values, segment)
    if step.exit is not None:
        chosen = exit_chosen(step.exit.gate, score, scope, **_bundles(taps.get("when", {})))
        return Decision(chosen, None, _take(size, chosen))
    chosen = step.select.apply(score, scope, **_bundles(taps.get("select", {})))
    merged = None
    if step.rest is not None:
        merged = step.rest.apply(feature, size, chosen, score, scope, **_bundles(taps.get("rest", {})))
    if merged is None:
        return Decision(chosen, None, _take(size, chosen))
    return Decision(merged[0], merged[1], merged[2])


def one_score(primitive: Any, taps: dict[str, Any], scope: Scope) -> torch.Tensor:
    """[B, V] float32: what a score primitive makes of its taps."""
    value: torch.Tensor = primitive.apply(scope=scope, **taps) if primitive.scoped else primitive.apply(**taps)
    return value


def _bundles(taps: dict[str, Any]) -> dict[str, Any]:
    """Attention taps travel through graphs as plain tuples."""
    whole = len(Attention._fields)
    return {
        name: Attention(*tap) if isinstance(tap, tuple) and len(tap) == whole else tap for name, tap in taps.items()
    }


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [B, V] at index [B, K]; pads give 0."""
    return or_pad(values, index, 0.0)
