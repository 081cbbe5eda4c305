"""merge_nearest: the tokens that were not chosen are averaged into their nearest target.

Shapes:  feature [B, V, D] float, metric [B, V, d] float, size [B, V] float, segment [B, V] int64 (-1 pads),
         counts [B, N] int64, chosen [B, K] int64 (-1 pads), score [B, V] float (read by `top` alone)
         -> index [B, K2] int64 ascending, pads (-1) first; feature [B, K2, D] and size [B, K2] like the inputs, pads 0
Targets: `amount` per segment where amount > 0, else a share of the tokens it has (portions.py)
         stride: of the M tokens of a segment that were not chosen, in order, 0, step, 2 step, ... (at most `amount`),
                 step = max(1, M // amount); top: the `amount` best-scored of them; both: K2 = K + slots.
         kept:   the chosen tokens themselves; K2 = K.
Merging: every other token goes to the target of its own segment with the highest cosine of the metric (the lower index
         among equals). A token of a segment without a target is dropped; so is, with within < 2, one whose 1 - cosine
         with its target is above that.
Reduce:  mean: (target + members) / (1 + number of members); target_mean: target + mean of members, nothing added to a
         target without members; size_weighted: sum(size * x) / sum(size); halving: the mean of the target and its first
         member, then of that and the next one, and so on. Sizes add up. Sums are float32.
Memory:  O(B V C) for C targets, never V x V.

Reference: VisionZip, arXiv 2412.04467 (stride targets, key cosine, target_mean); HoliTom, arXiv 2505.21334 (halving).
Deviation: where fewer tokens are left than targets asked for, all of them are targets; VisionZip's code fails there.
"""

from __future__ import annotations

import fractions
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tvc.errors import PolicyError
from tvc.kernels.budget import Budget
from tvc.kernels.op import Rest, Scope, Tap, op, primitive
from tvc.kernels.segments import budgets, mark, pack, per_token, ranks, rows_at


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    chosen = torch.tensor([[-1, 3, 6], [1, 4, 8], [-1, -1, 5]])
    feature, metric, score = torch.randn(3, 9, 6), torch.randn(3, 9, 4), torch.randn(3, 9)
    size = torch.randint(1, 4, (3, 9)).float()
    for reduce in ("mean", "target_mean", "size_weighted", "halving"):
        tensors = (feature, metric, size, segment, counts, chosen, score)
        yield f"stride-{reduce}", (*tensors, "stride", 2, 4, reduce)
        yield f"top-{reduce}", (*tensors, "top", 2, 4, reduce)
        yield f"kept-{reduce}", (*tensors, "kept", 0, 0, reduce)
        yield f"stride-share-{reduce}", (*tensors, "stride", 0, 3, reduce, 340)
        yield f"top-share-{reduce}", (*tensors, "top", 0, 3, reduce, 340)
        yield f"kept-within-{reduce}", (*tensors, "kept", 0, 0, reduce, 0, 0.6)
    yield "none-within", (*tensors, "stride", 2, 4, "mean", 0, 0.0)
    plain = (feature, metric, torch.ones(3, 9), segment, counts)
    yield "more-targets-than-rest", (*plain, chosen, score, "stride", 20, 40, "mean")
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    yield "none-chosen", (*plain, nothing, score, "stride", 2, 4, "target_mean")
    yield "none-chosen-kept", (*plain, nothing, score, "kept", 0, 0, "mean")
    no_token = (feature[:, :0], metric[:, :0], size[:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*no_token, nothing, score[:, :0], "stride", 2, 4, "mean")
    every = torch.where(segment < 0, -1, torch.arange(9))
    yield "all-chosen", (*plain, every, score, "stride", 2, 4, "mean")
    yield "equal-metric", (feature, torch.ones(3, 9, 4), *plain[2:], chosen, score, "stride", 2, 4, "mean")
    yield "zero-metric", (feature, torch.zeros(3, 9, 4), *plain[2:], chosen, torch.zeros(3, 9), "top", 2, 4, "mean")


def pick_targets(
    rest: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    score: torch.Tensor,
    targets: str,
    amounts: torch.Tensor,
) -> torch.Tensor:
    """[B, V] bool: which of the tokens in `rest` become targets."""
    left = torch.where(rest, segment, -1)
    numbers = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.int64, device=counts.device)
    numbers = numbers.scatter_add(1, left + 1, torch.ones_like(left))[:, 1:]
    if targets == "top":
        return rest & (ranks(left, numbers, score.float()) < per_token(amounts, left))
    place = ranks(left, numbers)
    step = per_token((numbers // amounts.clamp(min=1)).clamp(min=1), left)
    return rest & (place % step == 0) & (place // step < per_token(amounts, left))


def _nearest(
    metric: torch.Tensor, segment: torch.Tensor, index: torch.Tensor, within: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of `index [B, C]` each token is nearest to, C where its segment has none; whether it is within."""
    metric = metric.float()
    ones = torch.ones(metric.shape[2], 1, device=metric.device)
    metric = metric / ((metric * metric) @ ones).sqrt().clamp(min=1e-12)
    target = rows_at(metric, index)
    same = (segment[:, :, None] == per_token(segment, index)[:, None, :]) & (index >= 0)[:, None, :]
    near = torch.where(same, metric @ target.transpose(1, 2), float("-inf"))
    # Below every cosine, above every forbidden target. The row added on top keeps V = 0 right in ONNX Runtime, which
    # leaves the reduced axis of an empty tensor in place.
    near = torch.nn.functional.pad(near, (0, 1, 1, 0), value=-2.0)
    return near.argmax(2)[:, 1:], (near.amax(2) >= 1.0 - within)[:, 1:]


@op(_cases)
def merge_nearest(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    targets: str,
    amount: int,
    slots: int,
    reduce: str,
    permille: int = 0,
    within: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens and the targets, the other tokens merged into the targets."""
    kept = mark(chosen, segment.shape[1])
    rest = (segment >= 0) & ~kept
    if targets == "kept":
        target, stays, width, total = kept, kept, chosen.shape[1], chosen.shape[1]
    else:
        target = pick_targets(rest, segment, counts, score, targets, budgets(counts, permille, amount))
        stays, width, total = kept | target, slots, chosen.shape[1] + slots
    index = pack(target, width)
    member = rest & ~target
    nearest, close = _nearest(metric, segment, index, within)
    if within < 2.0:
        member = member & close
    to = ((nearest[:, :, None] == torch.arange(width + 1, device=index.device)) & member[:, :, None]).float()
    to = to.transpose(1, 2)  # [B, C + 1, V]

    wide, weight = feature.float(), size.float()[:, :, None]
    weighed = wide * weight if reduce == "size_weighted" else wide
    joined = to @ member.float()[:, :, None]  # [B, C + 1, 1] number of members
    gained = to @ weight  # [B, C + 1, 1] size of the members
    if reduce == "halving":
        # What a member brings is halved once when it comes and once for each member behind it.
        to = to * torch.pow(0.5, joined - to.cumsum(2) + 1.0)
    added = to @ torch.where(member[:, :, None], weighed, 0.0)  # [B, C + 1, D]

    result = pack(stays, total)
    # The number of each target among the targets, C for other tokens: where to look up what it gained.
    number = torch.where(target, target.cumsum(1) - 1 + (width - target.sum(1, keepdim=True)), width)
    number = per_token(number, result)
    own, own_size = rows_at(wide, result), rows_at(weight, result)
    added, joined, gained = rows_at(added, number), rows_at(joined, number), rows_at(gained, number)
    if reduce == "mean":
        merged = (own + added) / (1.0 + joined)
    elif reduce == "target_mean":
        merged = own + added / joined.clamp(min=1.0)
    elif reduce == "halving":
        merged = own * torch.pow(0.5, joined) + added
    else:
        merged = (own * own_size + added) / (own_size + gained).clamp(min=1e-12)
    changed = (number < width)[:, :, None] & (joined > 0)
    valid = (result >= 0)[:, :, None]
    merged = torch.where(valid, torch.where(changed, merged, own), 0.0).to(feature.dtype)
    sizes = torch.where(valid, own_size + torch.where(changed, gained, 0.0), 0.0).to(size.dtype)
    return result, merged, sizes.squeeze(2)


def _share(budget: Budget) -> Budget:
    if budget.share is None:
        raise ValueError("targets are a count (10) or a share (5%)")
    return budget


Amount = Annotated[int, Field(gt=0, strict=True)] | Annotated[Budget, AfterValidator(_share)]


class StrideTargets(BaseModel):
    """Evenly spaced targets among the tokens that were not chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stride: Amount = Field(description="targets per scope: a count, or a share of the tokens that enter")


class TopTargets(BaseModel):
    """The next best-scored tokens are the targets."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    top: Amount = Field(description="targets per scope: a count, or a share of the tokens that enter")


@primitive
class Merge(Rest):
    """The other tokens are averaged into their nearest target."""

    key: ClassVar[str] = "merge"
    targets: StrideTargets | TopTargets | Literal["kept"] = Field(
        "kept", description="{stride: n}, {top: n} or kept: the tokens that the others are merged into"
    )
    by: Literal["key_cosine", "feature_cosine"] = "feature_cosine"
    layer: str | None = Field(None, description="for key_cosine: the layer of the keys; default: the step's own")
    heads: Literal["mean", "joined"] = Field("mean", description="for key_cosine: their mean, or all side by side")
    reduce: Literal["mean", "target_mean", "size_weighted", "halving"] = "mean"
    within: float = Field(2.0, ge=0, le=2, description="1 - cosine with the target beyond which a token is dropped")

    def taps(self) -> dict[str, Tap]:
        heads = ("joined",) if self.heads == "joined" else ()
        return {"metric": Tap("key", self.layer, heads)} if self.by == "key_cosine" else {}

    @property
    def needs_score(self) -> bool:
        """Whether the targets are the best-scored tokens."""
        return isinstance(self.targets, TopTargets)

    def scaled(self, factor: fractions.Fraction) -> Merge:
        """With as many more or fewer targets, at least one."""
        rule, amount = self._rule()
        if isinstance(self.targets, str) or amount is None:
            return self
        more = amount.scaled(factor)
        value = more if more.count is None else more.count
        return self.model_copy(update={"targets": type(self.targets).model_validate({rule: value})})

    def _rule(self) -> tuple[str, Budget | None]:
        if isinstance(self.targets, str):
            return "kept", None
        rule = "stride" if isinstance(self.targets, StrideTargets) else "top"
        return rule, Budget.model_validate(getattr(self.targets, rule))

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
        metric: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        targets, amount = self._rule()
        if score is None and targets == "top":
            raise PolicyError(
                "the best-scored targets of a merge need a score",
                where="rest.merge.targets",
                got="a step without a score",
                want="a score, or targets that need none",
                fix="add `score:` to the step, or write targets: {stride: n}",
            )
        metric = feature if metric is None else metric
        score = torch.zeros_like(size, dtype=torch.float32) if score is None else score
        tensors = (feature, metric, size, scope.segment, scope.counts, chosen, score)
        amount = amount or Budget(count=1)
        slots = amount.slots(scope.segment.shape[1], scope.number)
        permille, count = amount.numbers
        merged: tuple[Any, Any, Any] = merge_nearest.overload(
            *tensors, targets, count, slots, self.reduce, permille, self.within
        )
        return merged

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        """Chosen tokens and targets: min(amount, tokens left) of each scope."""
        _, amount = self._rule()
        if amount is None:
            return chosen
        return [stays + min(amount.kept(count), count - stays) for count, stays in zip(counts, chosen, strict=True)]
