"""mean_query_score: what the mean query of all tokens so far asks of each visual token, times the token's length.

Shapes:  feature [B, V, D] float, query [B, H, Q, d], key [B, G, N, d] (G divides H), rows [B, R] int64 rows of the
         query (-1 pads), columns [B, V, g] int64 keys of each visual token (-1 pads), segment [B, V] int64 (-1 pads)
         -> [B, V] float32, pads 0
Rule:    each head's query is the mean over `rows` up to the last visual token; softmax of its products with the keys
         over the visual tokens of each segment; mean over heads, times the Euclidean norm of the feature.
Groups:  of several keys of a visual token the first counts: where one token is one key, as in a decoder.
Memory:  O(B H V).

Reference: PACT, arXiv 2504.08966 (its importance metric; queries and keys before rotary positions). Deviation: the
softmax is over the tokens of a segment, so that images do not depend on each other; published, over all of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.op import Attention, Scope, Score, Tap, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, 0, 0, 1], [0, 0, 0, 0]])
    columns = torch.tensor([[-1, 1, 2, 3], [1, 2, 4, 5]])[:, :, None]
    every = torch.tensor([[-1, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    for heads, groups in ((4, 4), (6, 2), (3, 1)):
        query, key, feature = torch.randn(2, heads, 7, 5), torch.randn(2, groups, 7, 5), torch.randn(2, 4, 6)
        yield f"H{heads}-G{groups}", (feature, query, key, every, columns, segment, 0.4)
        longer = torch.randn(2, groups, 10, 5)
        behind = torch.where(columns < 0, -1, columns + 3)
        yield f"H{heads}-G{groups}-behind-a-cache", (feature, query, longer, every, behind, segment, 0.4)
    yield "zeros", (torch.zeros(2, 4, 6), query, key, every, columns, segment, 0.4)
    yield "equal-keys", (feature, query, torch.ones(2, 1, 7, 5), every, columns, segment, 0.4)
    none = (torch.zeros(2, 0, 6), query, key, every, columns[:, :0], segment[:, :0], 0.4)
    yield "no-visual-token", none
    yield "pads-alone", (feature, query, key, every, torch.full_like(columns, -1), torch.full_like(segment, -1), 0.4)


@op(_cases)
def mean_query_score(
    feature: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    segment: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[B, V] float32: attention of the mean query, times the length of the feature."""
    batch, heads, asked, width = query.shape
    groups, visual = key.shape[1], columns.shape[1]
    column = columns[:, :, 0]
    # One more column keeps the maximum defined for V = 0.
    last = torch.nn.functional.pad(column, (0, 1), value=-1).amax(1, keepdim=True) - (key.shape[2] - asked)
    used = ((rows >= 0) & (rows <= last)).float()
    share = used / used.sum(1, keepdim=True).clamp(min=1)
    index = rows.clamp(min=0)[:, None, :, None].expand(batch, heads, rows.shape[1], width)
    mean = share[:, None, None, :] @ query.gather(2, index).float()  # [B, H, 1, d]
    taken = key.gather(2, column.clamp(min=0)[:, None, :, None].expand(batch, groups, visual, width)).float()
    logits = mean.reshape(batch, groups, heads // groups, width) @ taken.transpose(2, 3) * scale
    logits = logits.reshape(batch, heads, visual)
    # The largest of each segment, sums over each segment; column 0 takes the pads.
    place = torch.where(column >= 0, segment + 1, 0)[:, None, :].expand(batch, heads, visual)
    room = logits.new_zeros(batch, heads, visual + 1)
    high = torch.full_like(room, torch.finfo(torch.float32).min).scatter_reduce(2, place, logits, "amax")
    power = (logits - high.gather(2, place)).exp()
    attention = (power / room.scatter_add(2, place, power).gather(2, place)).mean(1)
    ones = torch.ones(feature.shape[2], 1, device=feature.device)
    length = ((feature.float() * feature.float()) @ ones).sqrt().squeeze(2)
    return torch.where(segment >= 0, attention * length, 0.0)


@primitive
class MeanQueryScore(Score):
    """What the mean query of all tokens up to the last visual one asks of a visual token, times the token's length."""

    key: ClassVar[str] = "mean_query"
    shorthand: ClassVar[str | None] = "layer"
    components: ClassVar[tuple[str, ...]] = ("language",)
    scoped: ClassVar[bool] = True
    layer: str = Field("self", description="the decoder layer in front of which the step acts, or an earlier one")

    def taps(self) -> dict[str, Tap]:
        return {"feature": Tap("feature"), "attention": Tap("attention", self.layer, ("all",), rotary=False)}

    def apply(self, scope: Scope, feature: torch.Tensor, attention: Attention) -> torch.Tensor:
        query, key, _, rows, columns, scale, *_ = attention
        return mean_query_score.overload(feature, query, key, rows, columns, scope.segment, scale)
