"""bipartite_merge: the tokens at even places that are most alike to one at an odd place are averaged into it.

Shapes:  feature [B, V, D] float, metric [B, V, d] float, size [B, V] float, segment [B, V] int64 (-1 pads),
         counts [B, N] int64 -> index [B, K] int64 ascending, pads (-1) first; feature [B, K, D] and size [B, K] like
         the inputs, pads 0; K = slots
Sets:    the tokens of a segment, in order, are even (0, 2, ...) or odd (1, 3, ...). An even token's partner is the odd
         one of its segment with the highest cosine of the metric.
Budget:  of n tokens in a segment n - (n * permille + 500) // 1000 merge, for a permille of 500 or more (half of them at
         most); with permille 0 it is min(remove, n // 2). Even tokens with the most similar partners go first.
Ties:    the lower index, among partners as among the even tokens.
Reduce:  size_weighted: sum(size * x) / sum(size); mean: (x + members) / (1 + number of members). Sizes add up, sums are
         float32, and a token that nothing merged into comes out as it was.
Whole:   True promises one segment that fills V in every sample, of which slots >= V - V // 2 stay.
Memory:  O(B V BLOCK): never the cosines of all even with all odd tokens.

Reference: ToMe, arXiv 2210.09461. Deviation: what stays is in its original order; published, the even tokens that stay
come first, without a class token in the order of their similarity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tvc.errors import PolicyError
from tvc.kernels.blocks import by_rows
from tvc.kernels.budget import OwnRounding
from tvc.kernels.greedy import rows
from tvc.kernels.loop import State
from tvc.kernels.op import Merging, Scope, Tap, op, primitive
from tvc.kernels.segments import mark, pack, per_token, ranks, rows_at


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    feature, metric = torch.randn(3, 9, 6), torch.randn(3, 9, 4)
    size = torch.randint(1, 4, (3, 9)).float()
    for reduce in ("mean", "size_weighted"):
        yield f"half-{reduce}", (feature, metric, size, segment, counts, 500, 0, 5, reduce, False)
        yield f"remove-{reduce}", (feature, metric, size, segment, counts, 0, 3, 7, reduce, False)
    plain = (feature, metric, torch.ones(3, 9), segment, counts)
    yield "most", (*plain, 750, 0, 7, "mean", False)
    yield "all-stay", (*plain, 1000, 0, 9, "size_weighted", False)
    yield "none-removed", (*plain, 0, 0, 9, "mean", False)
    yield "more-than-half", (*plain, 0, 40, 6, "size_weighted", False)
    yield "spare-slots", (*plain, 500, 0, 11, "mean", False)
    yield "equal-metric", (feature, torch.ones(3, 9, 4), *plain[2:], 500, 0, 5, "mean", False)
    yield "zero-metric", (feature, torch.zeros(3, 9, 4), *plain[2:], 0, 2, 8, "mean", False)
    mixed = (torch.randn(1, 7, 3), torch.randn(1, 7, 5), torch.ones(1, 7), torch.tensor([[1, 0, 1, 0, -1, 1, 0]]))
    yield "interleaved", (*mixed, torch.tensor([[3, 3]]), 600, 0, 5, "size_weighted", False)
    no_token = (feature[:, :0], metric[:, :0], size[:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*no_token, 500, 0, 1, "mean", False)
    one = (feature[:, :1], metric[:, :1], size[:, :1], torch.zeros(3, 1, dtype=torch.int64))
    yield "one-token", (*one, torch.ones(3, 1, dtype=torch.int64), 500, 0, 1, "mean", False)
    for length, remove in ((9, 4), (8, 3), (8, 0), (1, 0)):
        tensors = (torch.randn(2, length, 6), torch.randn(2, length, 4), torch.randint(1, 4, (2, length)).float())
        alone = (torch.zeros(2, length, dtype=torch.int64), torch.full((2, 1), length))
        budget = (0, remove, length - remove)
        yield f"whole-{length}-{remove}", (*tensors, *alone, *budget, "size_weighted", True)
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])[None]
    tied = (torch.randn(1, 6, 6), alike, torch.ones(1, 6), torch.zeros(1, 6, dtype=torch.int64), torch.tensor([[6]]))
    yield "tied", (*tied, 0, 1, 5, "mean", False)
    yield "tied-whole", (*tied, 0, 1, 5, "mean", True)


def _partners(
    metric: torch.Tensor, segment: torch.Tensor, even: torch.Tensor, odd: torch.Tensor, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, A] int64 where in `odd [B, C]` the partner of each of `even [B, A]` stands, [B, A] their cosine)."""
    unit = metric / ((metric * metric) @ torch.ones(metric.shape[2], 1, device=metric.device)).sqrt().clamp(min=1e-12)
    # No views: what a loop reads in a graph may share no memory.
    halved = (unit[:, 0::2].clone(), unit[:, 1::2].clone())
    ours, others = halved if whole else (rows_at(unit, even), rows_at(unit, odd))
    owner, other = per_token(segment, even), per_token(segment, odd)

    def block(at: torch.Tensor, new: torch.Tensor, partner: torch.Tensor, best: torch.Tensor) -> State:
        near = rows(ours, at) @ others.transpose(1, 2)
        if not whole:
            same = owner.gather(1, at)[:, :, None] == other[:, None, :]
            near = torch.where(same & (odd >= 0)[:, None, :], near, float("-inf"))
        # Below every cosine, above every forbidden partner: there is one more, where there may be none.
        near = torch.nn.functional.pad(near, (0, 1), value=-2.0)
        return partner.scatter(1, at, near.argmax(2)), best.scatter(1, at, near.amax(2))

    start = (torch.zeros_like(even), torch.zeros(even.shape, device=even.device))
    partner, best = by_rows(block, start, even)
    return partner, best


def _sums(values: torch.Tensor, to: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """[B, C, E]: the sum of those of `values [B, A, E]` that go `to [B, A]` each place of `over [B, C]`, -1 to none."""

    def block(at: torch.Tensor, new: torch.Tensor, total: torch.Tensor) -> State:
        into = (to[:, None, :] == at[:, :, None]).float()  # [B, b, A]
        return (total.scatter(1, at[:, :, None].expand(-1, -1, values.shape[2]), into @ values),)

    nothing = torch.zeros(*over.shape, values.shape[2], device=values.device)
    return by_rows(block, (nothing,), over)[0]


def halves(segment: torch.Tensor, counts: torch.Tensor, whole: bool) -> tuple[torch.Tensor, ...]:
    """(even [B, A], odd [B, C], number [B, V]): both sets' indices, -1 pads, and where in `odd` an odd token stands."""
    batch, visual = segment.shape
    if whole:
        place = torch.arange(visual, device=segment.device)
        even, odd, number = (values.expand(batch, -1) for values in (place[0::2], place[1::2], place // 2))
        return even, odd, number
    place, real = ranks(segment, counts), segment >= 0
    second = real & (place % 2 == 1)
    even = pack(real & ~second, (visual + counts.shape[1]) // 2)
    odd = pack(second, visual // 2)
    return even, odd, second.cumsum(1) - 1 + (visual // 2 - second.sum(1, keepdim=True))


def _fake(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    remove: int,
    slots: int,
    reduce: str,
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stays = (feature.shape[0], slots)
    return segment.new_empty(stays), feature.new_empty(*stays, feature.shape[2]), size.new_empty(stays)


@op(_cases, fake=_fake)
def bipartite_merge(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    remove: int,
    slots: int,
    reduce: str,
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the tokens that stay."""
    visual = segment.shape[1]
    even, odd, number = halves(segment, counts, whole)
    partner, best = _partners(metric.float(), segment, even, odd, whole)
    if whole:
        order = torch.sort(best, dim=1, descending=True, stable=True).indices
        rank = torch.arange(even.shape[1], device=even.device).expand(even.shape[0], -1)
        member = torch.zeros_like(order).scatter(1, order, rank) < visual - slots
    else:
        owner = torch.where(even >= 0, per_token(segment, even), -1)
        gone = counts - (counts * permille + 500) // 1000 if permille > 0 else (counts // 2).clamp(max=remove)
        member = (even >= 0) & (ranks(owner, (counts + 1) // 2, best) < per_token(gone, owner))

    wide, weight = feature.float(), size.float()[:, :, None]
    weighed = wide * weight if reduce == "size_weighted" else wide
    to = torch.where(member, partner, -1)
    sums = torch.cat([weighed, weight, torch.ones_like(weight)], 2)
    added, gained, joined = _sums(rows_at(sums, even), to, odd).split((feature.shape[2], 1, 1), 2)
    own, own_size = rows_at(wide, odd), rows_at(weight, odd)
    if reduce == "mean":
        merged = (own + added) / (1.0 + joined)
    else:
        merged = (own * own_size + added) / (own_size + gained).clamp(min=1e-12)
    merged = torch.where(joined > 0, merged, own).to(feature.dtype)

    second = mark(odd, visual)
    index = pack((segment >= 0) & ~mark(torch.where(member, even, -1), visual), slots)
    # One gather from the tokens as they were and the odd ones as they are, side by side.
    source = torch.where(second, visual + number, torch.arange(visual, device=segment.device))
    source = torch.where(index < 0, -1, per_token(source, index))
    sizes = torch.cat([size, (own_size + gained).squeeze(2).to(size.dtype)], 1)
    return index, rows_at(torch.cat([feature, merged], 1), source), rows_at(sizes[:, :, None], source).squeeze(2)


class Spread(BaseModel):
    """What `spread` means for a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tokens: int = Field(gt=0, description="tokens of a scope in front of the first of the steps")
    parts: int = Field(gt=0, description="into how many parts what goes is divided")


@primitive
class Bipartite(Merging):
    """Of two halves of the tokens, those of the one that are most alike to one of the other are averaged into it."""

    key: ClassVar[str] = "bipartite"
    shorthand: ClassVar[str | None] = "keep"
    keep: OwnRounding | None = Field(
        None, description="what stays of each scope; below half it takes several rounds, each of which halves at most"
    )
    remove: int | None = Field(None, gt=0, description="instead of keep: tokens that merge, half of a scope at most")
    spread: Literal["steps", "blocks"] | Spread | None = Field(
        None,
        description="keep is what many steps leave together, each merging equally many tokens: what goes, divided by "
        "the steps of this range or by the component's blocks",
    )
    by: Literal["key_cosine", "feature_cosine"] = "feature_cosine"
    layer: str | None = Field(None, description="for key_cosine: the layer of the keys; default: the step's own")
    reduce: Literal["size_weighted", "mean"] = "size_weighted"

    @model_validator(mode="after")
    def _one_budget(self) -> Bipartite:
        if (self.keep is None) == (self.remove is None):
            raise ValueError("give either `keep` or `remove`")
        if self.keep is None and self.spread is not None:
            raise ValueError("give `spread` together with `keep` alone")
        if self.keep is not None and self.keep.permille is None and (self.spread is None or self.keep.count is None):
            raise ValueError("give `keep` as a share, or as a count together with `spread`")
        return self

    def taps(self) -> dict[str, Tap]:
        return {"metric": Tap("key", self.layer)} if self.by == "key_cosine" else {}

    def for_model(self, tokens: int, steps: int, blocks: int) -> Bipartite:
        """With `spread` in numbers."""
        if not isinstance(self.spread, str):
            return self
        parts = steps if self.spread == "steps" else max(blocks, 1)
        return self.model_copy(update={"spread": Spread(tokens=max(tokens, 1), parts=parts)})

    def _rounds(self) -> list[tuple[int, int]]:
        """(permille, remove) of each round."""
        if self.remove is not None or self.keep is None:
            return [(0, self.remove or 0)]
        if isinstance(self.spread, Spread):
            tokens, share = self.spread.tokens, self.keep.permille
            gone = tokens * (1000 - share) // 1000 if share is not None else max(0, tokens - (self.keep.count or 0))
            # Divided once: floors of floors are one floor.
            return [(0, gone // self.spread.parts)]
        if self.spread is not None or self.keep.permille is None:
            raise PolicyError(
                "a budget that is spread over several steps has no numbers yet",
                where="merge.bipartite.spread",
                got=self.spread,
                want="the tokens and steps of a model",
                fix="resolve the policy for a model first: tvc.policy.resolve(policy, layout)",
                slug="unresolved-spread",
            )
        share = self.keep.permille
        rounds: list[tuple[int, int]] = []
        while share < 500:
            rounds.append((500, 0))
            share *= 2
        return [*rounds, (share, 0)]

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, metric: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        segment, counts = scope.segment, scope.counts
        index: torch.Tensor | None = None
        for permille, remove in self._rounds():
            visual: Any = segment.shape[1]
            if permille:
                share = (visual * permille + 500 * scope.number) // 1000
                slots = share if scope.whole else torch.sym_min(visual, share)
            else:
                # However the tokens are divided between the scopes, as many merge at least.
                slots = visual - torch.sym_min(remove, torch.sym_max(0, (visual - scope.number + 1) // 2))
            tensors = (feature, feature if metric is None else metric, size, segment, counts)
            chosen, feature, size = bipartite_merge.overload(
                *tensors, permille, remove, slots, self.reduce, scope.whole
            )
            index = chosen if index is None else _follow(index, chosen)
            segment = _follow(segment, chosen)
            counts = self._left(counts, permille, remove)
            # A token that others merged into keeps its own key.
            metric = None if metric is None else rows_at(metric, chosen)
        if index is None:
            raise ValueError("a merge has at least one round")
        return index, feature, size

    def kept(self, counts: list[int]) -> list[int]:
        left = torch.tensor(counts, dtype=torch.int64)
        for permille, remove in self._rounds():
            left = self._left(left, permille, remove)
        return [int(count) for count in left]

    @staticmethod
    def _left(counts: torch.Tensor, permille: int, remove: int) -> torch.Tensor:
        return (counts * permille + 500) // 1000 if permille else counts - (counts // 2).clamp(max=remove)


def _follow(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [B, V] at index [B, K]; pads stay -1."""
    return torch.where(index < 0, -1, per_token(values, index))
