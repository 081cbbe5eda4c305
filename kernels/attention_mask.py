"""attention_mask: which cached tokens a query may attend to, from sequence positions alone.

Shapes:  query_positions [B, Q] int64, key_positions [B, N] int64 -> [B, 1, Q, N] bool, True = may attend
Rule:    0 <= key <= query, and key > query - window where window > 0. One rule for padding, ragged batches, caches of
         uneven length, sliding windows, later turns and decode steps.
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


@op(_cases)
def attention_mask(query_positions: torch.Tensor, key_positions: torch.Tensor, window: int) -> torch.Tensor:
    """[B, 1, Q, N] bool from the sequence positions of queries and keys; window 0 = unlimited."""
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    allowed = (key >= 0) & (key <= query)
    if window > 0:
        allowed = allowed & (key > query - window)
    return allowed | (query < 0)
