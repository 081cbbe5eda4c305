"""segment_attention: attention of rows to the visual tokens of their own segment, and to no others.

`Attending` is the base of the rules for the rest by which the tokens that stay read others.

Shapes:  query [B, H, K, d] float, key and value [B, G, V, d] float (G divides H), own [B, K] int64 (-1 pads): the
         segment of each row; segment [B, V] int64 (-1 pads): that of each token -> [B, K, H d] float32, pads 0
Rule:    softmax of query . key / sqrt(d) over the tokens whose number in `segment` is that of the row; no positions. A
         row whose segment has no token gets 0.
Memory:  O(B H K V).

Reference: QTSplus, arXiv 2511.11910; code Siyou-Li/QTSplus@5cc24bc (read, not copied). Deviation: padding takes no part
in the attention; published, it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tvc.kernels.op import Rest, Tap, op
from tvc.kernels.score_query_attention import Grouped, heads_of
from tvc.kernels.weights import Shape


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    own = torch.tensor([[-1, 0, 0, 1], [0, 0, 0, 0], [-1, -1, -1, -1]])
    segment = torch.tensor([[-1, 0, 0, 0, 1], [-1, -1, -1, -1, 0], [0, 1, 2, 2, 2]])
    for heads, groups in ((1, 1), (4, 2)):
        query, key, value = (torch.randn(3, n, 4, 3) for n in (heads, groups, groups))
        yield f"H{heads}-G{groups}", (query, key, value, own, own)
        yield f"H{heads}-G{groups}-of-all", (query, *torch.randn(2, 3, groups, 5, 3), own, segment)
    some = torch.randn(3, 2, 4, 3), torch.randn(3, 2, 5, 3), torch.randn(3, 2, 5, 3)
    yield "segments-without-tokens", (*some, own, torch.where(segment == 0, 3, segment))
    none = torch.zeros(2, 0, dtype=torch.int64)
    yield "nothing", (*(torch.zeros(2, 1, 0, 3) for _ in range(3)), none, none)
    yield "nothing-to-see", (torch.randn(3, 2, 4, 3), *torch.randn(2, 3, 2, 0, 3), own, own[:, :0])


@op(_cases)
def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: torch.Tensor, segment: torch.Tensor
) -> torch.Tensor:
    """[B, K, H d] float32."""
    # One more token, which is seen where nothing else is: no row of the softmax is empty, and V may be 0.
    key, value = (torch.nn.functional.pad(rows.float(), (0, 0, 1, 0)) for rows in (key, value))
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # [B, G, H / G, K, d]
    logits = grouped @ key[:, :, None].transpose(3, 4) / math.sqrt(key.shape[3])
    same = (own[:, :, None] == segment[:, None, :]) & (own >= 0)[:, :, None]
    ones = torch.ones(same.shape[2], 1, device=same.device)
    seen = torch.cat([same.float() @ ones == 0, same], dim=2)[:, None, None]
    shares = logits.masked_fill(~seen, float("-inf")).softmax(4)
    return (shares @ value[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)


class Attending(Grouped, Rest):
    """A rule with a trained attention: what stays reads tokens of its scope, and keeps its place and its size."""

    def taps(self) -> dict[str, Tap]:
        return self.module()

    def shapes(self, width: int | str) -> dict[str, Shape]:
        found = self.sizes(width, "query", "key", "value")
        return {"norm.weight": (width,), **found, "output.weight": (width, found["query.weight"][0])}

    def read(
        self,
        kept: torch.Tensor,
        seen: torch.Tensor,
        own: torch.Tensor,
        segment: torch.Tensor,
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """[B, K, D] float32: what the rows `kept` [B, K, D] of segments `own` [B, K] take of `seen` [B, V, D]."""
        query = heads_of(kept, weights, "query", self.heads)
        key, value = (heads_of(seen, weights, name, self.groups) for name in ("key", "value"))
        mixed: torch.Tensor = segment_attention.overload(query, key, value, own, segment)
        return mixed @ weights["output.weight"].float().T
