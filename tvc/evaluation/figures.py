"""Replies to figures: accuracy by kind of question, relative to the dense model, and what it cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvc.evaluation.records import Record
from tvc.evaluation.statistics import relative, wilson
from tvc.evaluation.variants import DENSE, Variant
from tvc.report.plan import Plan


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy at one budget in one runtime; intervals are of 95 %.

    accuracy is the mean over the examples (and seeds); `relative` divides it by the dense model's. `agreement` is the
    share of examples whose first answer token is the dense model's. FLOPs are of one question up to the first answer
    token, vision encoder included; `kv_bytes` the cache then; both are the plan's, for a mean prompt. Where `at_most`,
    a step decides at run time how many tokens it leaves, and tokens, FLOPs and cache are the most there may be.
    """

    policy: str
    budget: str
    target: str
    seeds: int
    examples: int
    accuracy: float
    interval: tuple[float, float]
    kinds: dict[str, float]
    relative: float
    relative_interval: tuple[float, float]
    agreement: float
    visual_tokens: float  # left behind the last cut
    average_tokens: float  # visual, mean over the decoder's layers
    at_most: bool
    flops: int
    flops_ratio: float
    kv_bytes: int
    kv_ratio: float
    accuracies: tuple[float, ...]  # by seed
    settings: dict[str, Any]


def dense_row(dense: Sequence[Record], plan: Plan) -> Row:
    """The untouched model's, which also runs encoder blocks whose output the decoder does not read."""
    return _row(DENSE, "100%", "torch", [dense], dense, dataclasses.replace(plan, compiled=plan.dense), {})


def row(variant: Variant, target: str, replies: Sequence[Sequence[Record]], dense: Sequence[Record]) -> Row:
    """Of the replies of a variant's seeds, `replies[seed][example]`."""
    return _row(variant.label, variant.budget, target, replies, dense, variant.plan, variant.settings)


def _row(
    policy: str,
    budget: str,
    target: str,
    replies: Sequence[Sequence[Record]],
    dense: Sequence[Record],
    plan: Plan,
    settings: dict[str, Any],
) -> Row:
    right = np.array([[record.right for record in seed] for seed in replies], dtype=np.float64)  # [seeds, N]
    same = [[a.first == b.first for a, b in zip(seed, dense, strict=True)] for seed in replies]
    by_example, by_dense = right.mean(0), np.array([record.right for record in dense], dtype=np.float64)
    kinds = np.array([record.kind for record in dense])
    ratio, low, high = relative(by_example, by_dense)
    flops, dense_flops = (cost.vision + cost.prefill for cost in (plan.compiled, plan.dense))
    return Row(
        policy=policy,
        budget=budget,
        target=target,
        seeds=len(replies),
        examples=len(dense),
        accuracy=float(by_example.mean()),
        # Seeds answer the same examples: they add no independent trials.
        interval=wilson(float(by_example.mean()), len(dense)),
        kinds={kind: float(by_example[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())},
        relative=ratio,
        relative_interval=(low, high),
        agreement=float(np.mean(same)),
        visual_tokens=float(plan.layers[-1].visual),
        average_tokens=plan.average_visual_tokens,
        at_most=plan.fired is not None,
        flops=flops,
        flops_ratio=flops / dense_flops,
        kv_bytes=plan.compiled.kv_bytes,
        kv_ratio=plan.ratio["kv_bytes"],
        accuracies=tuple(right.mean(1).tolist()),
        settings=settings,
    )


def agreement_of_targets(variant: Variant, replies: Mapping[str, Sequence[Sequence[Record]]]) -> list[dict[str, Any]]:
    """For each pair of runtimes the share of replies that are the same, letter by letter."""
    made = []
    for one, other in itertools.combinations(replies, 2):
        pairs = [
            (a.text == b.text)
            for first, second in zip(replies[one], replies[other], strict=True)
            for a, b in zip(first, second, strict=True)
        ]
        entry = {"policy": variant.label, "budget": variant.budget, "targets": [one, other]}
        made.append({**entry, "replies": len(pairs), "same": sum(pairs)})
    return made
