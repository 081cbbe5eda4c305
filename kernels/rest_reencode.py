"""segment_attention: attention of the tokens that stay to those of their own segment.

Shapes:  query [B, H, K, d] float, key and value [B, G, K, d] float (G divides H), own [B, K] int64 (-1 pads)
         -> [B, K, H d] float32, pads 0
Rule:    softmax of query . key / sqrt(d) over the tokens with the same number in `own`; no positions.
Memory:  O(B H K K).

Reference: QTSplus, arXiv 2511.11910; code Siyou-Li/QTSplus@5cc24bc (read, not copied). Deviation: padding takes no part
in the attention; published, it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.kernels.op import Rest, Scope, Tap, op, primitive
from tvc.kernels.score_query_attention import Grouped, heads_of, rms_normed
from tvc.kernels.segments import per_token
from tvc.kernels.weights import Shape


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    own = torch.tensor([[-1, 0, 0, 1], [0, 0, 0, 0], [-1, -1, -1, -1]])
    for heads, groups in ((1, 1), (4, 2)):
        query, key, value = (torch.randn(3, n, 4, 3) for n in (heads, groups, groups))
        yield f"H{heads}-G{groups}", (query, key, value, own)
    yield "nothing", (*(torch.zeros(2, 1, 0, 3) for _ in range(3)), torch.zeros(2, 0, dtype=torch.int64))


@op(_cases)
def segment_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[B, K, H d] float32."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # [B, G, H / G, K, d]
    logits = grouped @ key.float()[:, :, None].transpose(3, 4) / math.sqrt(key.shape[3])
    same = (own[:, :, None] == own[:, None, :])[:, None, None]  # pads see pads: no row is empty
    shares = logits.masked_fill(~same, float("-inf")).softmax(4)
    made = (shares @ value.float()[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)
    return torch.where((own >= 0)[:, :, None], made, 0.0)


@primitive
class Reencode(Grouped, Rest):
    """The others are dropped, and a trained block of attention runs over the tokens that stay, image by image."""

    key: ClassVar[str] = "reencode"

    def taps(self) -> dict[str, Tap]:
        return self.module()

    def shapes(self, width: int | str) -> dict[str, Shape]:
        found = self.sizes(width, "query", "key", "value")
        return {"norm.weight": (width,), **found, "output.weight": (width, found["query.weight"][0])}

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
        weights: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = torch.where(chosen < 0, -1, per_token(scope.segment, chosen))
        # One more column to read from: V may be 0 where K is not.
        index = torch.where(chosen < 0, feature.shape[1], chosen)
        rows = torch.nn.functional.pad(feature, (0, 0, 0, 1))
        kept = rows.gather(1, index[:, :, None].expand(-1, -1, feature.shape[2]))
        normed = rms_normed(kept, weights["norm.weight"])
        query = heads_of(normed, weights, "query", self.heads)
        key, value = (heads_of(normed, weights, name, self.groups) for name in ("key", "value"))
        mixed = segment_attention.overload(query, key, value, own)
        made = kept.float() + mixed @ weights["output.weight"].float().T
        sizes = torch.nn.functional.pad(size, (0, 1)).gather(1, index)
        return chosen.clone(), made.to(feature.dtype), sizes
