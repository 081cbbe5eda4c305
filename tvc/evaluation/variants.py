"""What is compared: the untouched model, and each policy at each budget, baselines always among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tvc.errors import ArgumentError, SiteError, WeightsError
from tvc.policy import Policy, load_policy, resolve
from tvc.policy.schema import score_data
from tvc.policy.weights import check_weights
from tvc.program import Layout
from tvc.report.budget import settings_at, share_of
from tvc.report.plan import Plan
from tvc.report.schedule import plan_policy

DENSE = "dense"
AS_WRITTEN = "as-written"
BASELINES = ("random", "uniform")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One policy at one budget with one seed; `budget` is a share (`25%`) or AS_WRITTEN."""

    label: str
    budget: str
    seed: int | None
    policy: Policy
    plan: Plan
    settings: dict[str, Any]  # what the budget sets: what is published for it, or budgets that were solved for
    reached: float  # visual tokens: what the budget is measured in

    @property
    def name(self) -> str:
        """Unique in a study, fit for a file name."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.label}-{self.budget.rstrip('%')}{seed}"


@dataclasses.dataclass(frozen=True)
class Refused:
    """A policy and budget that this model cannot run, and why."""

    label: str
    budget: str
    reason: str


def shares(budgets: Sequence[str]) -> list[str]:
    """Budgets in one spelling, each once.

    Raises:
        ArgumentError: one is neither a share of the visual tokens nor AS_WRITTEN.
    """
    want = f"shares such as 50%,25%, or {AS_WRITTEN} for policies as they are"
    written = [text if text == AS_WRITTEN else share_of(text, "--budgets", want) for text in budgets]
    return list(dict.fromkeys(written))


def labelled(policies: Sequence[Any], baselines: bool = True) -> dict[str, Policy]:
    """The policies and the baselines under names that differ; two policies of one meaning are one."""
    named: dict[str, Policy] = {}
    meanings: set[str] = set()
    for given in (*policies, *(BASELINES if baselines else ())):
        policy = load_policy(given)
        if policy.digest() in meanings:
            continue
        meanings.add(policy.digest())
        base = label = re.sub(r"[^\w.+]+", "-", policy.name).strip("-") or "policy"
        number = 2
        while label in named or label == DENSE:
            label, number = f"{base}-{number}", number + 1
        named[label] = policy
    return named


def variants(
    policies: dict[str, Policy], layout: Layout, budgets: Sequence[str], seeds: int, average: bool, text_tokens: int
) -> Iterator[Variant | Refused]:
    """Every policy at every budget; one that draws at random with several seeds.

    Args:
        policies: by label.
        layout: the model.
        budgets: shares or AS_WRITTEN.
        seeds: how many of a policy that draws at random.
        average: a share is of the mean over the decoder's layers, whatever a policy measures.
        text_tokens: of a prompt, for the costs.
    """
    for label, policy in policies.items():
        for budget in budgets:
            try:
                settings = {} if budget == AS_WRITTEN else settings_at(policy, layout, budget, average=average)
                chosen = policy.with_settings(settings)
                check_weights(resolve(chosen, layout).steps, layout)
                plan = plan_policy(chosen, layout, text_tokens=text_tokens, new_tokens=1)
            except (SiteError, ArgumentError, WeightsError) as problem:
                yield Refused(label, budget, f"{problem.summary}: {problem.got}; possible: {problem.want}")
                continue
            mean = average or policy.measure == "average"
            reached = plan.average_visual_tokens if mean else float(plan.layers[-1].visual)
            for seed in _seeds(chosen, seeds):
                seeded = chosen if seed is None else chosen.with_settings(_seed_settings(chosen, seed))
                yield Variant(label, budget, seed, seeded, plan, settings, reached)


def _seeds(policy: Policy, count: int) -> Sequence[int | None]:
    return range(count) if _seed_settings(policy, 0) else (None,)


def _seed_settings(policy: Policy, seed: int) -> dict[str, Any]:
    """Settings that give every score with a seed this one."""
    found: dict[str, Any] = {}
    for index, step in enumerate(policy.steps):
        drawn = [term for term in step.score if "seed" in type(term.primitive).model_fields]
        if drawn:
            terms = score_data(step.score)
            for term in terms:
                for key, fields in term.items():
                    if isinstance(fields, dict) and "seed" in fields:
                        term[key] = {**fields, "seed": seed}
            found[f"steps.{index}.score"] = terms
    return found
