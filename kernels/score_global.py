"""global_score: how much attention each visual token receives from the tokens that receive most of it themselves.

Shapes:  as attention_score: query [B, H, Q, d], key [B, G, N, d], mask [B|1, 1|H, Q, N] bool or None, rows [B, R],
         columns [B, V, g], image [B, N] int64 image of each key or None (one) -> [B, V] float32. Row q of the query is
         key N - Q + q.
Rule:    softmax over all N keys in float32, mean over heads. A row is global where what it receives from the rows,
         on average, exceeds `above` times the mean over the rows; where none does, the one that receives most is. The
         score is the mean over the global rows, then over the g keys. Of several images, each is judged by itself.
Pads:    -1 in rows and columns; a sample without rows, or a token without keys, scores 0.
Memory:  O(B H BLOCK N) however many rows there are.

Reference: VFlowOpt, arXiv 2508.05211 (importance map). Deviation: the published code gives NaN where no row is global.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.attention import one_a_token
from tvc.kernels.op import Attention, Score, Tap, op, primitive
from tvc.kernels.score_attention import received


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, length, past, width in ((1, 4, 4, 7, 0, 8), (2, 6, 2, 9, 2, 4), (3, 4, 1, 5, 0, 16)):
        query, key = torch.randn(batch, heads, length, width), torch.randn(batch, groups, past + length, width)
        causal = torch.ones(length, past + length, dtype=torch.bool).tril(past)[None, None]
        every = torch.arange(length).repeat(batch, 1)
        some = torch.where(every < length - 3, every, -1)
        single = torch.arange(1, 4)[None, :, None].repeat(batch, 1, 1)
        paired = torch.tensor([[[-1, -1], [0, 1], [2, 3], [4, -1]]]).repeat(batch, 1, 1)
        name, scale = f"B{batch}-H{heads}-G{groups}", width**-0.5
        yield f"{name}-all-rows", (query, key, None, every, single, scale, 1.0, None)
        yield f"{name}-some-rows", (query, key, causal, some, paired, scale, 0.5, None)
        yield f"{name}-none-above", (query, key, causal, every, paired, scale, 1e3, None)
        yield f"{name}-no-rows", (query, key, causal, torch.full((batch, 2), -1), single, scale, 1.0, None)
        image = (torch.arange(past + length) >= past + length // 2).long().repeat(batch, 1)
        apart = (image[:, None, -length:, None] == image[:, None, None, :]) & (torch.rand(length, past + length) > 0.3)
        apart |= torch.eye(length, past + length, dtype=torch.bool).roll(past, 1)
        yield f"{name}-softcap", (query, key, causal, every, single, 4 * scale, 1.0, None, 2.0)
        yield f"{name}-two-images", (query, key, apart, every, paired, scale, 1.0, image)
        yield f"{name}-two-images-some-rows", (query, key, apart, some, single, scale, 0.9, image)


@op(_cases, fake=one_a_token)
def global_score(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    above: float,
    image: torch.Tensor | None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: the mean attention that the global ones among `rows` pay to `columns`."""
    length, keys = query.shape[2], key.shape[2]
    scoring = (rows >= 0).float()
    place = rows.clamp(min=0) + keys - length
    payer_image = torch.zeros_like(rows) if image is None else image.gather(1, place)

    # Where each row's image adds up, numbered from 1; pads add up in column 0.
    slot = torch.where(rows >= 0, payer_image + 1, 0)
    room = torch.zeros(rows.shape[0], keys + 2, device=rows.device)

    def over_image(values: torch.Tensor) -> torch.Tensor:
        """[B, R]: the sum of `values [B, R]` over the rows of each row's image."""
        return room.scatter_add(1, slot, values).gather(1, slot) * scoring

    def highest(values: torch.Tensor) -> torch.Tensor:
        """[B, R]: the highest of `values [B, R]`, 0 or more, over the rows of each row's image."""
        return room.scatter_reduce(1, slot, values, "amax").gather(1, slot) * scoring

    def pooled(payer: torch.Tensor) -> torch.Tensor:
        """[B, N]: the mean over those rows of the key's image that `payer [B, R]` marks, and over heads."""
        share = payer / over_image(payer).clamp(min=1)
        return received(query, key, mask, rows, scale, share, softcap=softcap).mean(1)

    own = pooled(scoring).gather(1, place) * scoring
    mean = over_image(own) / over_image(scoring).clamp(min=1)
    spread = pooled(((own > above * mean) | (own == highest(own))).float() * scoring)
    taken = spread.gather(1, columns.clamp(min=0).flatten(1)).reshape(columns.shape)
    present = (columns >= 0).float()
    # Sums over g are matrix products: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(columns.shape[2], 1, device=columns.device)
    return ((taken * present) @ ones / (present @ ones).clamp(min=1)).squeeze(2)


@primitive
class GlobalScore(Score):
    """The attention a visual token receives in one layer from those tokens that gather most of the attention."""

    key: ClassVar[str] = "global"
    shorthand: ClassVar[str | None] = "above"
    above: float = Field(28.7, gt=0, allow_inf_nan=False, description="times the mean that a token must receive to pay")
    of: Literal["all"] = Field("all", description="who may pay: every token of the layer")
    layer: str = Field("previous", description="previous, self, language.K or vision.K")

    def taps(self) -> dict[str, Tap]:
        return {"attention": Tap("attention", self.layer, (self.of,))}

    def apply(self, attention: Attention) -> torch.Tensor:
        score: torch.Tensor = global_score.overload(*attention[:6], self.above, attention.image, attention.softcap)
        return score
