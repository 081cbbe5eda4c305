"""A policy at a budget: a share of the visual tokens becomes settings, published or all scaled by one factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tvc.errors import ArgumentError, SiteError
from tvc.kernels.budget import Budget
from tvc.policy import Policy, resolve
from tvc.program import Layout
from tvc.report.plan import setting
from tvc.report.schedule import plan_policy, solve_average, solve_kept

LADDER = ("50%", "33%", "22%", "11%", "5%")  # what papers compare at


def share_of(text: str, where: str, want: str = "a share such as 25%") -> str:
    """A share of the visual tokens in one spelling: `33.0 %` is `33%`.

    Args:
        where: the argument that it was written for.
        want: what may be written there.

    Raises:
        ArgumentError: it is no share.
    """
    try:
        budget = Budget.model_validate(text)
    except ValueError:
        budget = Budget(count=1)
    if budget.permille is None:
        raise ArgumentError(
            "a budget is no share of the visual tokens",
            where=where,
            got=text,
            want=want,
            fix="write a share with a percent sign",
            slug="bad-budget",
        )
    return str(budget)


def settings_at(policy: Policy, layout: Layout, share: str, *, average: bool = False) -> dict[str, Any]:
    """What to set in a policy so that it works at a budget, for `Policy.with_settings`.

    A budget that the policy names gives the settings written there, whatever they leave in this model. For any other
    all numbers of tokens are scaled by one factor, so that the policy's measure is the share: what the last cut leaves,
    or the mean over the decoder's layers.

    Args:
        share: of the visual tokens, as `share_of` spells it.
        average: the mean shall be the share whatever the policy measures, a number to be met: always by scaling.

    Raises:
        SiteError: the model cannot do what the policy says. ArgumentError: no factor meets the budget.
    """
    if share in policy.budgets and not average:
        return dict(policy.budgets[share])
    target = sum(layout.visual_tokens) * (Budget.model_validate(share).permille or 0) / 1000
    resolved = resolve(policy, layout)
    if average or policy.measure == "average":
        return dict(solve_average(resolved, layout, target, where="--budgets").settings)
    return dict(solve_kept(resolved, layout, target).settings)


@dataclasses.dataclass(frozen=True)
class Rung:
    """What a policy does at one budget in one model; without settings, why it does not."""

    share: str
    published: bool  # the settings are the policy's own, and not scaled
    settings: dict[str, Any]
    visual_tokens: float  # by the policy's measure
    kv_ratio: float
    why_not: str = ""

    def text(self) -> str:
        if self.why_not:
            return f"{self.share:>4}  {self.why_not}"
        how = "published" if self.published else "scaled"
        settings = ", ".join(setting(*given) for given in self.settings.items())
        return f"{self.share:>4}  {self.visual_tokens:6.1f}  {self.kv_ratio:6.1%}  {how:9}  {settings}"


def ladder(policy: Policy, layout: Layout, text_tokens: int = 64) -> Iterator[Rung]:
    """The policy at each budget that papers compare at, in one model and for one image."""
    for share in LADDER:
        try:
            settings = settings_at(policy, layout, share)
            plan = plan_policy(policy.with_settings(settings), layout, text_tokens=text_tokens)
        except (ArgumentError, SiteError) as refusal:
            yield Rung(share, False, {}, 0.0, 0.0, f"{refusal.summary}: {refusal.want}")
            continue
        left = plan.average_visual_tokens if policy.measure == "average" else float(plan.layers[-1].visual)
        yield Rung(share, share in policy.budgets, settings, left, plan.ratio["kv_bytes"])
