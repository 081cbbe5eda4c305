"""Which policies act on a model as they are, and why the others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tvc.errors import TvcError
from tvc.policy.schema import Policy
from tvc.program import Layout
from tvc.report.schedule import plan_policy


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An error's lines, see `TvcError`."""

    code: str
    slug: str
    summary: str
    where: str
    got: str
    want: str
    fix: str


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a policy does to a model.

    Attributes:
        visual_tokens: in a layer of the decoder, on average; None where it is refused.
        at_most: how many there are only the run tells; these are the most.
    """

    name: str
    visual_tokens: float | None = None
    at_most: bool = False
    refusal: Refusal | None = None

    def text(self) -> str:
        """One line for people."""
        if self.refusal is not None:
            return f"no: {self.refusal.summary}; {self.refusal.fix}"
        return f"{'at most ' if self.at_most else ''}{self.visual_tokens:.1f}"


def fits(policies: Iterable[Policy], layout: Layout) -> list[Fit]:
    """What each policy does to the model of `layout`, as far as is known without a trace and without weights."""
    return [_fit(policy, layout) for policy in policies]


def _fit(policy: Policy, layout: Layout) -> Fit:
    try:
        plan = plan_policy(policy, layout)
    except TvcError as error:
        lines = {field.name: getattr(error, field.name) for field in dataclasses.fields(Refusal)}
        return Fit(policy.name, refusal=Refusal(**lines))
    return Fit(policy.name, plan.average_visual_tokens, plan.fired is not None)
