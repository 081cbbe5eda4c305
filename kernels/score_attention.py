"""attention_score: how much attention each visual token receives, from the q and k that enter an attention op.

Shapes:  query [B, H, Q, d], key [B, G, N, d] (G divides H), mask [B|1, 1|H, Q, N] bool, float or None (everything),
         rows [B, R] int64 rows of the query that score, columns [B, V, g] int64 keys of each visual token
         -> [B, V] float32
Rule:    softmax over all N keys in float32, mean over the rows, heads by mean, sum or max, mean over the g keys.
         Joined heads are one head of the full width: the dot product over H d numbers, scale / sqrt(H), one softmax;
         of what masks say of a key the strictest head counts. A soft cap is put on logits as the layer has it.
Pads:    -1 in rows and columns; a sample without rows, or a token without keys, scores 0.
Memory:  O(B H BLOCK N) however many rows score; keys are not repeated for grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.attention import capped, masked, one_a_token, readable, row_logits, rows_allowed
from tvc.kernels.blocks import by_rows
from tvc.kernels.loop import State
from tvc.kernels.op import Attention, Score, Tap, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, heads, groups, length, width in ((1, 4, 4, 7, 8), (2, 6, 2, 9, 4), (3, 4, 1, 5, 16)):
        query, key = torch.randn(batch, heads, length, width), torch.randn(batch, groups, length, width)
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        rows = torch.tensor([[-1, length - 1]]).repeat(batch, 1)
        rows[0] = torch.tensor([1, length - 2])
        single = torch.arange(1, 4)[None, :, None].repeat(batch, 1, 1)
        paired = torch.tensor([[[-1, -1], [0, 1], [2, 3], [4, -1]]]).repeat(batch, 1, 1)
        name, scale = f"B{batch}-H{heads}-G{groups}", width**-0.5
        yield f"{name}-mean", (query, key, causal, rows, single, scale, "mean")
        yield f"{name}-sum", (query, key, None, rows, paired, scale, "sum")
        per_head = torch.rand(batch, heads, length, length) > 0.4
        yield f"{name}-max", (query, key, per_head, rows, paired, scale, "max")
        yield f"{name}-joined", (query, key, causal, rows, paired, scale, "joined")
        yield f"{name}-joined-per-head", (query, key, per_head, rows, single, scale, "joined")
        every = torch.arange(length).repeat(batch, 1)
        yield f"{name}-all-rows", (query, key, causal, every, single, scale, "mean")
        bias = torch.where(causal, torch.randn(batch, heads, length, length), torch.finfo(torch.float32).min)
        yield f"{name}-bias", (query, key, bias, rows, single, scale, "mean")
        yield f"{name}-bias-joined", (query, key, bias[:, :1], every, single, scale, "joined")
        yield f"{name}-softcap", (query, key, causal, rows, paired, 4 * scale, "mean", 2.0)
        yield f"{name}-softcap-joined", (query, key, causal, every, single, 4 * scale, "joined", 2.0)
        yield f"{name}-no-rows", (query, key, causal, torch.full((batch, 2), -1), single, scale, "mean")


def received(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    scale: float,
    share: torch.Tensor,
    joined: bool = False,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, H, N] float32: the attention that `rows` pay to every key, each by its `share [B, R]`; joined heads are 1."""
    logits, mask = _joined if joined else row_logits, readable(mask, query, key)

    def pay(at: torch.Tensor, new: torch.Tensor, paid: torch.Tensor) -> State:
        weight = share.gather(1, at) * new
        own = logits(query, key, mask, rows.gather(1, at), scale, softcap).softmax(-1)
        return (paid + (own * weight[:, None, :, None]).sum(2),)

    nothing = torch.zeros(rows.shape[0], 1 if joined else query.shape[1], key.shape[2], device=query.device)
    return by_rows(pay, (nothing,), rows)[0]


@op(_cases, fake=one_a_token)
def attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    heads: str,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, V] float32: the attention that `rows` pay to `columns`; `heads` is mean, sum, max or joined."""
    scoring = (rows >= 0).float()
    share = scoring / scoring.sum(1, keepdim=True).clamp(min=1)
    paid = received(query, key, mask, rows, scale, share, heads == "joined", softcap)
    if heads == "max":
        pooled = paid.amax(1)
    else:
        pooled = paid.sum(1) if heads == "sum" else paid.mean(1)
    taken = pooled.gather(1, columns.clamp(min=0).flatten(1)).reshape(columns.shape)
    present = (columns >= 0).float()
    # Sums over g are matrix products: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(columns.shape[2], 1, device=columns.device)
    return ((taken * present) @ ones / (present @ ones).clamp(min=1)).squeeze(2)


def _joined(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[B, 1, R, N]: as `row_logits`, with all heads as one of the full width; every head's mask has to allow."""
    batch, heads, _, width = query.shape
    groups, keys, number = key.shape[1], key.shape[2], rows.shape[1]
    row = rows.clamp(min=0)[:, None, :, None]
    picked = query.gather(2, row.expand(batch, heads, number, width)).float()
    picked = picked.transpose(1, 2).reshape(batch, number, heads * width)
    wide = key.float()[:, :, None].expand(batch, groups, heads // groups, keys, width)
    wide = wide.reshape(batch, heads, keys, width).transpose(1, 2).reshape(batch, keys, heads * width)
    logits = capped((picked @ wide.transpose(1, 2) * (scale * heads**-0.5))[:, None], softcap)
    said = None if mask is None else rows_allowed(mask, rows, keys)
    if said is not None and said.shape[1] > 1:
        said = said.all(1, keepdim=True) if said.dtype == torch.bool else said.amin(1, keepdim=True)
    return masked(logits, said)


def rows_ratio(attention: Attention) -> torch.Tensor:
    """[B, V] float32: how many times more rows there are than rows of a token's own image.

    Packed images do not attend to each other, so a mean over the rows of all of them, times this, is the mean over the
    rows of the token's own: it does not depend on what else is packed.
    """
    rows, columns, image = attention.rows, attention.columns, attention.image
    if image is None:
        raise ValueError("there is nothing to tell apart: image is None")
    real = rows >= 0
    past = attention.key.shape[2] - attention.query.shape[2]
    payer = torch.where(real, image.gather(1, rows.clamp(min=0) + past), -1)
    own = image.gather(1, columns.amax(2).clamp(min=0))
    among = (payer[:, None, :] == own[:, :, None]).sum(2)
    return real.sum(1, keepdim=True) / among.clamp(min=1)


Rows = Literal["cls", "last", "text", "raters", "visual", "all"]


@primitive
class AttentionScore(Score):
    """The attention a visual token receives in one layer, from the class token, the last token, the text or all."""

    key: ClassVar[str] = "attention"
    shorthand: ClassVar[str | None] = "of"
    of: Rows | tuple[Rows, ...] = Field("last", description="who pays the attention; of a list, the first the site has")
    layer: str = Field(
        "previous", description="previous, self, language.K or vision.K; a range (vision.67%..-2): one term a layer"
    )
    heads: Literal["mean", "sum", "max", "joined"] = "mean"

    def taps(self) -> dict[str, Tap]:
        return {"attention": Tap("attention", self.layer, (self.of,) if isinstance(self.of, str) else self.of)}

    def apply(self, attention: Attention) -> torch.Tensor:
        score: torch.Tensor = attention_score.overload(*attention[:6], self.heads, attention.softcap)
        return score if attention.image is None else score * rows_ratio(attention)
