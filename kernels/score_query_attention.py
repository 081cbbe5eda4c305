"""cross_score: the most attention that any head of any text token pays to a visual token, by trained projections.

Shapes:  query [B, H, T, d] float, key [B, G, V, d] float (G divides H), asked [B, T] bool, seen [B, V] bool
         -> [B, V] float32, 0 for tokens that are not seen
Rule:    softmax of query . key / sqrt(d) over the seen visual tokens, in float32; maximum over H and the asked text.
Edges:   without asked text all is 0.
Memory:  O(B H T V).

Reference: QTSplus, arXiv 2511.11910; code Siyou-Li/QTSplus@5cc24bc (read, not copied).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator

from tvc.errors import WeightsError
from tvc.kernels.op import Score, Tap, op, primitive
from tvc.kernels.weights import Shape, Trained

EPSILON = 1e-6


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, words, tokens in ((1, 1, 1, 1, 1), (2, 4, 2, 3, 7), (3, 2, 1, 4, 5)):
        asked, seen = torch.rand(batch, words) > 0.3, torch.rand(batch, tokens) > 0.3
        asked[0], seen[0] = True, True
        pair = torch.randn(batch, heads, words, 4), torch.randn(batch, groups, tokens, 4)
        yield f"B{batch}-H{heads}-G{groups}-T{words}-V{tokens}", (*pair, asked, seen)
    pair, yes = (torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)), torch.ones(2, 5, dtype=torch.bool)
    yield "nothing-asked", (*pair, ~yes[:, :3], yes)
    yield "nothing-seen", (*pair, yes[:, :3], ~yes)
    yield "no-visual-token", (pair[0], pair[1][:, :, :0], yes[:, :3], yes[:, :0])


@op(_cases)
def cross_score(query: torch.Tensor, key: torch.Tensor, asked: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: the largest share of attention that each visual token gets."""
    groups, width = key.shape[1], key.shape[3]
    grouped = query.float().unflatten(1, (groups, -1))  # [B, G, H / G, T, d]
    logits = grouped @ key.float()[:, :, None].transpose(3, 4) / math.sqrt(width)
    # The lowest finite number, not -inf: a sample that sees nothing stays free of NaN.
    shares = logits.masked_fill(~seen[:, None, None, None], torch.finfo(torch.float32).min).softmax(4)
    counted = asked[:, None, None, :, None] & seen[:, None, None, None]
    flat = torch.where(counted, shares, 0.0).flatten(1, 3)  # [B, H T, V]
    # One more row keeps the maximum defined for T = 0.
    return torch.nn.functional.pad(flat, (0, 0, 0, 1)).amax(1)


def rms_normed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The rows with a mean square of 1, times a weight, in float32."""
    rows = rows.float()
    ones = torch.full((rows.shape[-1], 1), 1.0 / rows.shape[-1], device=rows.device)
    return rows / ((rows * rows) @ ones + EPSILON).sqrt() * weight.float()


def heads_of(rows: torch.Tensor, weights: dict[str, torch.Tensor], name: str, heads: int) -> torch.Tensor:
    """[B, heads, N, d]: the projection `name` of rows [B, N, D]."""
    made = rows @ weights[f"{name}.weight"].float().T
    if f"{name}.bias" in weights:
        made = made + weights[f"{name}.bias"].float()
    return made.unflatten(2, (heads, -1)).transpose(1, 2)


class Grouped(Trained):
    """A primitive with an attention of its own, several heads of queries to one of keys."""

    heads: int = Field(ge=1, description="heads of the queries")
    groups: int = Field(ge=1, description="heads of the keys and values; they divide those of the queries")
    bias: bool = Field(True, description="whether queries, keys and values have biases")

    def sizes(self, width: int | str, *names: str) -> dict[str, Shape]:
        """The shapes of the projections `names`, of which `query` has all the heads."""
        if isinstance(width, int) and width % self.heads:
            raise WeightsError(
                f"the heads of `{self.key}` do not divide the width of the tokens",
                where=str(self.weights),
                got=f"{self.heads} heads, {width} wide",
                want="heads that divide the width",
                fix="write the heads that the weights were trained with",
                slug="heads-mismatch",
            )
        found: dict[str, Shape] = {}
        for name in names:
            number = self.heads if name == "query" else self.groups
            size = number * (width // self.heads) if isinstance(width, int) else name
            found |= {f"{name}.weight": (size, width)} | ({f"{name}.bias": (size,)} if self.bias else {})
        return found

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.heads % self.groups:
            raise ValueError("give `groups` that divide `heads`")
        return self


@primitive
class QueryAttention(Grouped, Score):
    """The most attention that the text behind the image pays to a visual token, by trained queries and keys."""

    key: ClassVar[str] = "query_attention"

    def taps(self) -> dict[str, Tap]:
        return {
            "feature": Tap("feature"),
            "ordinal": Tap("ordinal"),
            "text": Tap("text", of=("behind",)),
            **self.module(),
        }

    def shapes(self, width: int | str) -> dict[str, Shape]:
        norms: dict[str, Shape] = {"norm_text.weight": (width,), "norm_visual.weight": (width,)}
        return {**norms, **self.sizes(width, "query", "key")}

    def apply(
        self,
        feature: torch.Tensor,
        ordinal: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        words, asked = text
        query = heads_of(rms_normed(words, weights["norm_text.weight"]), weights, "query", self.heads)
        key = heads_of(rms_normed(feature, weights["norm_visual.weight"]), weights, "key", self.groups)
        score: torch.Tensor = cross_score.overload(query, key, asked, ordinal >= 0)
        return score
