"""attention_runs, attend, attend_score: causal attention masked by positions alone, without the mask in memory.

`attend` is `attention`, and `attend_score` is `attention_score`, over `attention_mask(query_positions, key_positions,
0)`. A pass puts them where both stand on a device that has kernels; everywhere else those ops stay what they are.

Shapes:  query [B, H, Q, d], key [B, G, N, d], value [B, G, N, e], G divides H; query_positions [B, Q] int64,
         key_positions [B, N] int64, -1 pads -> [B, H, Q, e]
Order:   the last Q keys are the queries' own. Pads come first in a chunk, and positions ascend behind them.
Pads:    rows of pad queries hold any finite numbers: no real token ever attends to them.
Runs:    `attention_runs` gives where the pads and the tokens of each sample begin in the packed sequence [B * N] of a
         chunk without a past; each run attends to itself alone, which is what packed kernels take. [2B + 1] int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tvc.kernels.attention import one_a_token, repeat_groups
from tvc.kernels.attention_mask import attention_mask
from tvc.kernels.op import op
from tvc.kernels.score_attention import attention_score


def _run_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    yield "ragged", (torch.tensor([[-1, -1, 0, 1, 5], [0, 1, 2, 3, 9], [-1, -1, -1, -1, 0]]),)


@op(_run_cases)
def attention_runs(key_positions: torch.Tensor) -> torch.Tensor:
    """[2B + 1] int32: first slot of each sample's pads and of its tokens in the packed batch, and its end."""
    batch, length = key_positions.shape
    start = torch.arange(batch + 1, device=key_positions.device) * length
    pairs = torch.stack([start[:-1], start[:-1] + (key_positions < 0).sum(1)], 1)
    # A trace would take the number of a pad's value for a constant: the end is a tensor too.
    return torch.cat([pairs.reshape(-1), start[-1:]]).to(torch.int32)


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, columns, width in ((1, 4, 4, 5, 8), (3, 4, 2, 9, 16), (2, 7, 1, 33, 24)):
        places = torch.arange(columns).repeat(batch, 1) * 2
        places[0, : columns // 3] = -1
        query = torch.randn(batch, heads, 1, width)
        key, value = torch.randn(batch, groups, columns, width), torch.randn(batch, groups, columns, width)
        now = places[:, -1:].clone()
        yield f"B{batch}-H{heads}-G{groups}-N{columns}", (query, key, value, now, places, None, width**-0.5)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    runs: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    torch._check(key.shape[2] == value.shape[2])
    torch._check(key_positions.shape[1] == key.shape[2])
    torch._check(query_positions.shape[1] == query.shape[2])
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)


@op(_cases, fake=_fake)
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    runs: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """[B, H, Q, e]: softmax(query keyT * scale) value over the keys with 0 <= key position <= query position.

    Args:
        runs: `attention_runs(key_positions)`, for kernels that take a packed batch.
    """
    mask = attention_mask.reference(query_positions, key_positions, 0)
    key, value = repeat_groups(key, query.shape[1]), repeat_groups(value, query.shape[1])
    made = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # Row by row of the queries, as what follows wants it and flash attention makes it.
    return made.transpose(1, 2).contiguous().transpose(1, 2)


def _score_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    places = torch.tensor([[-1, 0, 1, 2, -1, 5, 6, 7, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    rows, columns = torch.tensor([[4, -1, 2], [-1, -1, 0]]), torch.arange(8)[None, :, None].repeat(2, 1, 1)
    columns[1, :3] = -1
    for groups in (1, 2, 4):
        query, key = torch.randn(2, 4, 5, 8), torch.randn(2, groups, 9, 8)
        for heads in ("mean", "sum", "max", "joined"):
            yield f"G{groups}-{heads}", (query, key, places[:, -5:].clone(), places, rows, columns, 0.3, heads)
        yield f"G{groups}-softcap", (query, key, places[:, -5:].clone(), places, rows, columns, 2.0, "sum", 1.5)


def _fake_score(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
    _, _, rows, columns, *_ = rest
    return one_a_token(query, key, None, rows, columns)


@op(_score_cases, fake=_fake_score)
def attend_score(
    query: torch.Tensor,
    key: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: the attention that `rows [B, R]` pay to `columns [B, V, g]` among keys not behind them.

    Args:
        query: [B, H, Q, d]; key: [B, G, N, d]; query_positions, key_positions: [B, Q] and [B, N] int64, -1 pads.
        rows, columns, scale, heads, softcap: as for `attention_score`.
    """
    # Of the mask only the rows that score are made.
    picked = rows.clamp(min=0)
    chosen = query.gather(2, picked[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    mask = attention_mask.reference(query_positions.gather(1, picked), key_positions, 0)
    number = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
    number = torch.where(rows < 0, -1, number)
    return attention_score.reference(chosen, key, mask, number, columns, scale, heads, softcap)
