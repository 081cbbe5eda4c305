"""attention_mask: which cached tokens a query may attend to, from sequence positions alone.

Shapes:  query_positions [B, Q] int64, key_positions [B, N] int64 -> [B, 1, Q, N] bool, True = may attend
Rule:    0 <= key <= query, and key > query - window where window > 0. One rule for padding, ragged batches, caches of
         uneven length, sliding windows, later turns and decode steps.
Spans:   spans [B, Q, 2] int64 or None: first and last place of the span that the query stands in, inside which tokens
         attend to each other in both directions (a prefix, the tokens of an image). Keys up to the span's last place
         are allowed, and those from its first place on also outside the window. A token without a span: its own place
         twice. A span whose first place is the token's own reaches ahead alone: the window holds inside it too.
Chunks:  chunks [B, Q] int64 or None: the stretch of a video that each query is of, -1 for text and pads. The last Q
         keys are the queries' own. A token of one stretch sees none of more than `previous` stretches before it; what
         is cached, and text, is seen by all and sees all.
Pads:    position -1. A pad key is never attended; a pad query attends to everything, so that its softmax stays finite.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    chunk = torch.arange(6).repeat(2, 1)
    chunk[1, :2] = -1
    for window in (0, 3):
        yield f"prefill-window{window}", (chunk, chunk, window)
        past = torch.tensor([[-1, 0, 2, 5, 9], [0, 3, 4, 8, 9]])
        yield f"decode-window{window}", (torch.tensor([[9], [9]]), past, window)
        yield f"batch1-window{window}", (torch.tensor([[-1, 4, 7]]), torch.tensor([[-1, 1, 4, 7]]), window)
        block = torch.tensor([[0, 0], [1, 4], [1, 4], [1, 4], [1, 4], [5, 5]]).repeat(2, 1, 1)
        yield f"block-window{window}", (chunk, chunk, window, block)
        ahead = block.clone()
        ahead[..., 0] = chunk
        yield f"ahead-window{window}", (chunk, chunk, window, ahead)
        video = torch.tensor([[-1, 0, 0, 1, 2, 3], [-1, -1, 0, 1, -1, 2]])
        keys = torch.cat([torch.tensor([[0, 1], [-1, 0]]), chunk + 2 * (chunk >= 0)], 1)
        for previous in (0, 1):
            arguments = (keys[:, 2:].clone(), keys, window, None, video, previous)
            yield f"chunks-previous{previous}-window{window}", arguments
        yield f"chunks-block-window{window}", (chunk, chunk, window, block, video, 0)


@op(_cases)
def attention_mask(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    window: int,
    spans: torch.Tensor | None = None,
    chunks: torch.Tensor | None = None,
    previous: int = 0,
) -> torch.Tensor:
    """[B, 1, Q, N] bool from the sequence positions of queries and keys; window 0 = unlimited."""
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    if spans is None:
        first, last = query, query
    else:
        first, last = spans[:, None, :, :1], torch.maximum(spans[:, None, :, 1:], query)
    allowed = (key >= 0) & (key <= last)
    if window > 0:
        near = key > query - window
        allowed = allowed & (near if spans is None else near | (key >= first))
    if chunks is not None:
        cached = torch.full_like(key_positions[:, : key_positions.shape[1] - chunks.shape[1]], -1)
        of_query, of_key = chunks[:, None, :, None], torch.cat([cached, chunks], 1)[:, None, None, :]
        allowed = allowed & ((of_key < 0) | (of_query < 0) | (of_key >= of_query - previous))
    return allowed | (query < 0)
