"""unrotated_keys, unrotated_attention: attention in which some pairs are read as if they stood at one place.

A rotary embedding turns query and key by their places, so that a logit tells how far they are apart. Where `raw` says
so, the logit is that of the two before they are turned; one softmax joins both kinds.

unrotated_keys       [B, G, S, d] the chunk's keys as they are cached: those of visual tokens raw, the others turned
unrotated_attention  [B, H, Q, e] what `attention` gives, of logits of two kinds

Shapes:  query, raw_query [B, H, Q, d]; key, raw_key [B, G, N, d], value [B, G, N, e], G divides H
         mask bool [B|1, 1, Q, N] (True = may attend); raw bool [B, 1, Q, N]
Memory:  the logits of either kind are held whole, so that no key is repeated for its head or made twice as wide.
Source:  Vista-LLaMA (arXiv:2312.08870), equal distance to visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op
from tvc.kernels.segments import mark


def _key_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    key, raw = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    yield "some", (key, raw, torch.tensor([[1, 2, 4], [-1, -1, 5]]))
    yield "none-in-a-sample", (key, raw, torch.tensor([[0, 5], [-1, -1]]))
    yield "every-slot", (key, raw, torch.arange(6).repeat(2, 1))
    yield "step", (key[:, :, :1], raw[:, :, :1], torch.zeros(2, 0, dtype=torch.int64))


@op(_key_cases)
def unrotated_keys(key: torch.Tensor, raw_key: torch.Tensor, visual_index: torch.Tensor) -> torch.Tensor:
    """[B, G, S, d]: `raw_key` at the slots `visual_index` [B, V] (-1 pads), `key` at the others."""
    visual = mark(visual_index, key.shape[2])
    return torch.where(visual[:, None, :, None], raw_key, key)


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, rows, columns, width in ((1, 4, 4, 5, 5, 8), (3, 4, 2, 1, 9, 16), (2, 6, 1, 7, 11, 8)):
        query, raw_query = torch.randn(2, batch, heads, rows, width)
        key, raw_key, value = torch.randn(3, batch, groups, columns, width)
        mask = torch.rand(batch, 1, rows, columns) > 0.3
        mask[..., 0] = True
        name, given = f"B{batch}-H{heads}-G{groups}-Q{rows}-N{columns}", (query, key, value, mask, raw_query, raw_key)
        for label, raw in (("some", torch.rand(batch, 1, rows, columns) > 0.5), ("none", mask & False)):
            yield f"{name}-{label}", (*given, raw, width**-0.5, 0.0)
        yield f"{name}-all-softcap", (*given, mask | True, width**-0.5, 5.0)


def logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, H, Q, N]: every query times the keys of its group, which stay as few as they are."""
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    together = query.reshape(batch, groups, heads // groups * rows, width)
    return (together @ key.transpose(2, 3)).reshape(batch, heads, rows, keys)


@op(_cases)
def unrotated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    raw_query: torch.Tensor,
    raw_key: torch.Tensor,
    raw: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """softmax(softcap(raw ? raw_query raw_keyT : query keyT, times scale) + mask) value; softcap 0 means none."""
    made = torch.where(raw, logits(raw_query * scale, raw_key), logits(query * scale, key))
    if softcap:
        made = torch.tanh(made / softcap) * softcap
    weights = made.masked_fill(~mask, float("-inf")).float().softmax(-1).to(value.dtype)
    batch, heads, rows, keys = weights.shape
    groups = value.shape[1]
    together = weights.reshape(batch, groups, heads // groups * rows, keys) @ value
    return together.reshape(batch, heads, rows, value.shape[3])
