"""What is compared: the untouched model, and each policy at each budget, baselines always among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tvc.errors import ArgumentError, SiteError, WeightsError
from tvc.kernels.budget import Budget
from tvc.policy import Policy, load_policy, resolve
from tvc.policy.schema import score_data
from tvc.policy.weights import check_weights
from tvc.program import Layout
from tvc.report.plan import Plan
from tvc.report.schedule import plan_policy, solve_average, solve_kept

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
    settings: dict[str, Any]  # the budgets that were solved for
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
    written = []
    for text in budgets:
        if text != AS_WRITTEN:
            try:
                budget = Budget.model_validate(text)
            except ValueError:
                budget = Budget(count=1)
            if budget.permille is None:
                raise ArgumentError(
                    "a budget is no share of the visual tokens",
                    where="--budgets",
                    got=text,
                    want=f"shares such as 50%,25%, or {AS_WRITTEN} for policies as they are",
                    fix="write a share with a percent sign",
                    slug="bad-budget",
                )
            text = str(budget)
        written.append(text)
    return list(dict.fromkeys(written))


def labelled(policies: Sequence[Any]) -> dict[str, Policy]:
    """The policies and the baselines under names that differ; two policies of one meaning are one."""
    named: dict[str, Policy] = {}
    meanings: set[str] = set()
    for given in (*policies, *BASELINES):
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
        average: a share is of the mean over the decoder's layers, not of what is left behind the last cut.
        text_tokens: of a prompt, for the costs.
    """
    for label, policy in policies.items():
        for budget in budgets:
            try:
                settings = _settings(policy, layout, budget, average)
                chosen = policy.with_settings(settings)
                check_weights(resolve(chosen, layout).steps, layout)
                plan = plan_policy(chosen, layout, text_tokens=text_tokens, new_tokens=1)
            except (SiteError, ArgumentError, WeightsError) as problem:
                yield Refused(label, budget, f"{problem.summary}: {problem.got}; possible: {problem.want}")
                continue
            reached = plan.average_visual_tokens if average else float(plan.layers[-1].visual)
            for seed in _seeds(chosen, seeds):
                seeded = chosen if seed is None else chosen.with_settings(_seed_settings(chosen, seed))
                yield Variant(label, budget, seed, seeded, plan, settings, reached)


def _settings(policy: Policy, layout: Layout, budget: str, average: bool) -> dict[str, Any]:
    if budget == AS_WRITTEN:
        return {}
    permille = Budget.model_validate(budget).permille or 0
    target = sum(layout.visual_tokens) * permille / 1000
    solve = solve_average if average else solve_kept
    return dict(solve(resolve(policy, layout), layout, target).settings)


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
