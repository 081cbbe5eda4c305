"""segment_attention: attention of rows to the visual tokens of their own segment, and to no others.

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

from tvc.kernels.op import op


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
