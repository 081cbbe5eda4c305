"""attention, packed_attention: the attention of a block, kept whole in the graph.

A block's attention is traced as one node, so that a pass finds q, k and the mask as its arguments, keys are never
repeated for grouped queries before a target asks for it, and each target lowers it to the best form it has.

Shapes:  query [B, H, Q, d], key [B, G, N, d], value [B, G, N, e], G divides H -> [B, H, Q, e]
Mask:    bool [B|1, 1|H, Q, N] (True = may attend), or float of that shape (added to the logits), or None (everything).
Rows with no True at all are undefined; `attention_mask` never makes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tvc.kernels.op import op

LOWEST = torch.finfo(torch.float32).min


def _shapes() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, rows, columns, width in ((1, 4, 4, 5, 5, 8), (3, 4, 2, 1, 9, 16), (2, 6, 1, 7, 11, 8)):
        query = torch.randn(batch, heads, rows, width)
        key, value = torch.randn(batch, groups, columns, width), torch.randn(batch, groups, columns, width)
        mask = torch.rand(batch, 1, rows, columns) > 0.3
        mask[..., 0] = True
        name = f"B{batch}-H{heads}-G{groups}-Q{rows}-N{columns}"
        yield f"{name}-open", (query, key, value, None, width**-0.5, 0.0)
        yield f"{name}-mask", (query, key, value, mask, width**-0.5, 0.0)
        yield f"{name}-softcap", (query, key, value, mask, width**-0.5, 5.0)


def repeat_groups(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, G, N, d] -> [B, H, N, d]: each key/value group serves H / G consecutive query heads."""
    groups = tensor.shape[1]
    if groups == heads:
        return tensor
    return tensor.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)


def rows_allowed(mask: torch.Tensor, rows: torch.Tensor, keys: int) -> torch.Tensor:
    """[B, 1|H, R, N]: what a mask says of `rows [B, R]` of the query and of `keys` keys; pads (-1) read row 0."""
    allowed = mask.expand(rows.shape[0], mask.shape[1], mask.shape[2], keys)
    row = rows.clamp(min=0)[:, None, :, None]
    return allowed.gather(2, row.expand(rows.shape[0], mask.shape[1], rows.shape[1], keys))


def readable(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask for the body of a loop: Dynamo refuses sizes and strides that are not those of query and key by name."""
    if mask is None or not torch.compiler.is_exporting():
        return mask
    sizes = (*mask.shape[:2], query.shape[2], key.shape[2])
    return mask.expand(sizes).clone(memory_format=torch.contiguous_format)


def one_a_token(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    """[B, V] float32: the shape of what an op gives that scores tokens by attention."""
    return query.new_empty(columns.shape[:2], dtype=torch.float32)


def row_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, H, R, N] float32: logits of `rows [B, R]` of the query; where the mask forbids, the lowest finite number.

    Not -inf: a row that may attend to nothing stays free of NaN. Pads (-1) read row 0. `softcap` as for `attention`.
    """
    batch, heads, _, width = query.shape
    groups, keys, number = key.shape[1], key.shape[2], rows.shape[1]
    row = rows.clamp(min=0)[:, None, :, None]
    picked = query.gather(2, row.expand(batch, heads, number, width)).float()
    picked = picked.reshape(batch, groups, heads // groups * number, width)
    logits = (picked @ key.float().transpose(2, 3) * scale).reshape(batch, heads, number, keys)
    return masked(capped(logits, softcap), None if mask is None else rows_allowed(mask, rows, keys))


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Logits that a hyperbolic tangent keeps within -softcap and softcap; 0 means as they are."""
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def masked(logits: torch.Tensor, said: torch.Tensor | None) -> torch.Tensor:
    """Logits with what a mask says of them: False gives the lowest finite number, a float is added."""
    if said is None:
        return logits
    return logits.masked_fill(~said, LOWEST) if said.dtype == torch.bool else logits + said.float()


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    key, value = repeat_groups(key, query.shape[1]), repeat_groups(value, query.shape[1])
    if softcap == 0.0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    logits = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits.float().softmax(-1).to(value.dtype) @ value


def _fake_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    # Sizes that must agree are said to agree, so that a trace gives them one symbol.
    torch._check(key.shape[2] == value.shape[2])
    if mask is not None and isinstance(mask.shape[2], torch.SymInt):
        torch._check(mask.shape[0] == query.shape[0])
        torch._check(mask.shape[2] == query.shape[2])
        torch._check(mask.shape[3] == key.shape[2])
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """softmax(softcap(query keyT * scale) + mask) value; softcap 0 means none."""
    return _attention(query, key, value, mask, scale, softcap).contiguous()


def _packed_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for boundaries in ([0, 5], [0, 3, 4, 11]):
        total = boundaries[-1]
        query, key, value = (torch.randn(1, 2, total, 8) for _ in range(3))
        yield (
            f"P{total}-n{len(boundaries) - 1}",
            (query, key, value, torch.tensor(boundaries, dtype=torch.int32), 8**-0.5),
        )


def packed_mask(boundaries: torch.Tensor, length: int) -> torch.Tensor:
    """[1, 1, P, P] bool: True where two tokens of a packed sequence belong to the same segment."""
    inner = boundaries[1:].to(torch.int64)
    segment = (torch.arange(length, device=boundaries.device)[:, None] >= inner[None, :]).sum(1)
    return (segment[:, None] == segment[None, :])[None, None]


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention inside each segment of a packed sequence [1, H, P, d]; segment i is boundaries[i]:boundaries[i + 1]."""
    mask = packed_mask(boundaries, query.shape[2])
    return _attention(query, key, value, mask, scale, 0.0).contiguous()


def _fake_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scale: float
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])


def _packed_lowering(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scale: float
) -> torch.Tensor:
    return _attention(query, key, value, packed_mask(boundaries, query.shape[2]), scale, 0.0)


attention_op = op(_shapes, fake=_fake_attention, lowering=_attention)(attention)
packed_attention_op = op(_packed_cases, fake=_fake_packed, lowering=_packed_lowering)(packed_attention)
