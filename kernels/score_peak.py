"""peak_score: the most attention that any one of some tokens pays each visual token, from the q and k of a layer.

Shapes:  query [B, H, Q, d], key [B, G, N, d] (G divides H), mask [B|1, 1|H, Q, N] bool or None (everything),
         rows [B, R] int64 rows of the query that score, columns [B, V, g] int64 keys of each visual token
         -> [B, V] float32
Rule:    softmax over all N keys in float32, mean over heads, mean over the g keys, the largest over the rows; with
         heads max the largest over heads as well, behind the mean over the g keys.
Pads:    -1 in rows and columns; a sample without rows, or a token without keys, scores 0.
Memory:  O(B H BLOCK N) however many rows score.

Reference: MustDrop, arXiv 2411.10803 (the individual threshold); PruneVID, arXiv 2412.16117 (heads max).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.attention import one_a_token, readable, row_logits
from tvc.kernels.blocks import by_rows
from tvc.kernels.loop import State
from tvc.kernels.op import Attention, Score, Tap, op, primitive
from tvc.kernels.score_attention import Rows


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, length, width in ((1, 4, 4, 7, 8), (2, 6, 2, 9, 4), (3, 4, 1, 5, 16)):
        query, key = torch.randn(batch, heads, length, width), torch.randn(batch, groups, length, width)
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        rows = torch.tensor([[-1, length - 1]]).repeat(batch, 1)
        rows[0] = torch.tensor([1, length - 2])
        single = torch.arange(1, 4)[None, :, None].repeat(batch, 1, 1)
        paired = torch.tensor([[[-1, -1], [0, 1], [2, 3], [4, -1]]]).repeat(batch, 1, 1)
        name, scale = f"B{batch}-H{heads}-G{groups}", width**-0.5
        yield f"{name}-causal", (query, key, causal, rows, single, scale)
        yield f"{name}-all", (query, key, None, torch.arange(length).repeat(batch, 1), paired, scale)
        yield f"{name}-per-head", (query, key, torch.rand(batch, heads, length, length) > 0.4, rows, single, scale)
        yield f"{name}-max-causal", (query, key, causal, rows, single, scale, "max")
        yield f"{name}-max-all", (query, key, None, torch.arange(length).repeat(batch, 1), paired, scale, "max")
        yield f"{name}-max-no-rows", (query, key, causal, torch.full((batch, 2), -1), single, scale, "max")
        yield f"{name}-no-rows", (query, key, causal, torch.full((batch, 2), -1), single, scale)
        yield f"{name}-softcap", (query, key, causal, rows, single, 4 * scale, "mean", 2.0)
        yield f"{name}-no-visual-token", (query, key, causal, rows, single[:, :0], scale)


@op(_cases, fake=one_a_token)
def peak_score(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str = "mean",
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: the largest of what each of `rows` pays to `columns`."""
    place, present = columns.clamp(min=0), (columns >= 0).float()
    # One after the other: in a loop no size may be told from a tensor that is empty in a decode step.
    parts = [(place[:, None, :, g].clone(), present[:, None, :, g].clone()) for g in range(columns.shape[2])]
    count = functools.reduce(torch.add, (real for _, real in parts)).clamp(min=1)  # [B, 1, V]
    mask = readable(mask, query, key)

    def most(at: torch.Tensor, new: torch.Tensor, before: torch.Tensor) -> State:
        rated = rows.gather(1, at)
        paid = row_logits(query, key, mask, rated, scale, softcap).softmax(-1)  # [B, H, b, N]
        if heads == "max":
            # Heads side by side are further rows.
            rated, paid = rated.repeat(1, paid.shape[1]), paid.flatten(1, 2)
        else:
            paid = paid.mean(1)
        paid = torch.where((rated >= 0)[:, :, None], paid, 0.0)  # [B, b, N]
        taken = (paid.gather(2, of.expand(-1, paid.shape[1], -1)) * real for of, real in parts)
        return (torch.maximum(before, (functools.reduce(torch.add, taken) / count).amax(1)),)

    return by_rows(most, (torch.zeros(columns.shape[:2], device=columns.device),), rows)[0]


@primitive
class PeakScore(Score):
    """The most attention that any single one of the asking tokens pays a visual token."""

    key: ClassVar[str] = "peak"
    shorthand: ClassVar[str | None] = "of"
    components: ClassVar[tuple[str, ...]] = ("language",)
    of: Rows = Field("text", description="who pays the attention")
    layer: str = Field("previous", description="previous, self or language.K")
    heads: Literal["mean", "max"] = Field("mean", description="the mean over heads, or the head that pays most")

    def taps(self) -> dict[str, Tap]:
        return {"attention": Tap("attention", self.layer, (self.of,))}

    def apply(self, attention: Attention) -> torch.Tensor:
        return peak_score.overload(*attention[:6], self.heads, attention.softcap)
