"""pagerank_score: where attention leads that is followed from token to token.

Shapes:  query [B, H, Q, d], key [B, G, N, d] (G divides H), mask [B|1, 1|H, Q, N] bool or None (everything),
         rows [B, R] int64 rows of the query between which attention is followed, columns [B, V, g] int64 keys of each
         visual token -> [B, V] float32
Rule:    in every head a walker starts at each row alike and moves `rounds` times along the softmax over all N keys of
         q k scale / temperature, in float32. The score is the root mean square over the heads of the chance to end at
         a token, mean over the g keys. A walk that leaves the rows (into the cache) is lost; nothing is damped.
Pads:    -1 in rows and columns; a sample without rows, or a token without keys, scores 0.
Memory:  O(B H BLOCK N) however many rows there are, whose attention is made anew for each step.

Reference: AIM, arXiv 2412.03248 (temperature 0.1, 5 steps).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.attention import one_a_token, readable, row_logits
from tvc.kernels.blocks import by_rows
from tvc.kernels.loop import State, repeat
from tvc.kernels.op import Attention, Score, Tap, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, length, width in ((1, 2, 2, 5, 4), (2, 4, 2, 7, 4), (3, 2, 1, 4, 8)):
        query, key = torch.randn(batch, heads, length, width), torch.randn(batch, groups, length, width)
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        every = torch.arange(length).repeat(batch, 1)
        some = torch.where(every < 1, -1, every)
        single = torch.arange(1, 4)[None, :, None].repeat(batch, 1, 1)
        paired = torch.tensor([[[-1, -1], [0, 1], [2, 3], [3, -1]]]).repeat(batch, 1, 1)
        name, scale = f"B{batch}-H{heads}-G{groups}", width**-0.5
        yield f"{name}-all", (query, key, causal, every, single, scale, 0.5, 5)
        yield f"{name}-some", (query, key, causal, some, paired, scale, 1.0, 2)
        yield f"{name}-softcap", (query, key, causal, every, single, 4 * scale, 0.5, 3, 2.0)
        yield f"{name}-no-rows", (query, key, None, torch.full((batch, 2), -1), single, scale, 0.5, 3)
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 1, 8, 4)
    ahead = torch.ones(3, 8, dtype=torch.bool).tril(5)[None, None]
    columns = torch.tensor([[[5], [6]], [[-1], [7]]])
    yield "behind-a-cache", (query, key, ahead, torch.arange(3).repeat(2, 1), columns, 0.5, 1.0, 2)
    yield "no-visual-token", (query, key, ahead, torch.arange(3).repeat(2, 1), columns[:, :0], 0.5, 1.0, 2)


def at_places(values: torch.Tensor, rows: torch.Tensor, past: int, length: int) -> torch.Tensor:
    """[B, N] float32: `values [B, R]` at the keys of the rows [B, R] (-1 pads) behind a cache of `past`; else 0."""
    # Column 0 takes the pads and is cut off.
    room = torch.zeros(rows.shape[0], length + 1, device=values.device)
    return room.scatter(1, torch.where(rows < 0, 0, rows + past + 1), values)[:, 1:]


def of_tokens(spread: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: the mean of `spread [B, N]` over the keys of each token, `columns [B, V, g]` (-1 pads)."""
    taken = spread.gather(1, columns.clamp(min=0).flatten(1)).reshape(columns.shape)
    present = (columns >= 0).float()
    # Sums over g are matrix products: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(columns.shape[2], 1, device=columns.device)
    return ((taken * present) @ ones / (present @ ones).clamp(min=1)).squeeze(2)


@op(_cases, fake=one_a_token)
def pagerank_score(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    temperature: float,
    rounds: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: where `rounds` steps along the attention lead."""
    batch, head_count, row_count = query.shape[0], query.shape[1], rows.shape[1]
    past = key.shape[2] - query.shape[2]
    real = (rows >= 0).float()
    place = rows.clamp(min=0) + past

    # Divided by the temperature is what the cap leaves, and so the cap may be.
    mask, warm = readable(mask, query, key), (scale / temperature, softcap / temperature)

    def step(number: torch.Tensor, chance: torch.Tensor) -> State:
        def move(at: torch.Tensor, new: torch.Tensor, after: torch.Tensor) -> State:
            paid = row_logits(query, key, mask, rows.gather(1, at), *warm).softmax(-1)
            to = place[:, None, None, :].expand(-1, paid.shape[1], paid.shape[2], -1)
            leaving = chance.gather(3, at[:, None, None, :].expand(-1, paid.shape[1], -1, -1)) * new
            return (after + leaving @ (paid.gather(3, to) * real[:, None, None, :]),)

        return by_rows(move, (torch.zeros_like(chance),), rows)

    first = (real / real.sum(1, keepdim=True).clamp(min=1))[:, None, None, :].expand(batch, head_count, 1, row_count)
    chance = repeat(step, (first.clone(),), torch.full((), rounds, dtype=torch.int64, device=rows.device))[0]
    rank = chance.square().mean(1).squeeze(1).sqrt() * real  # [B, R]
    return of_tokens(at_places(rank, rows, past, key.shape[2]), columns)


@primitive
class PageRankScore(Score):
    """Where attention leads that is followed from token to token for a few steps."""

    key: ClassVar[str] = "pagerank"
    components: ClassVar[tuple[str, ...]] = ("language",)
    layer: str = Field("previous", description="the layer of the attention: previous, self or language.K")
    temperature: float = Field(0.1, gt=0, allow_inf_nan=False)
    rounds: int = Field(5, ge=1, le=16)

    def taps(self) -> dict[str, Tap]:
        return {"attention": Tap("attention", self.layer, ("all",))}

    def apply(self, attention: Attention) -> torch.Tensor:
        score: torch.Tensor = pagerank_score.overload(*attention[:6], self.temperature, self.rounds, attention.softcap)
        return score
