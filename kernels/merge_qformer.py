"""Q-Former: trained queries read the tokens of an image through several layers, and each becomes one new token.

    x = n(queries);  in each layer:  x = n(x + A(x, x));  x = n(x + A(x, tokens));  x = n(x + W_2 gelu(W_1 x))
    new token = W_p x + b_p

`A(x, y)` is attention of x to y with heads and an output layer, `n` a layer norm with an epsilon of 1e-12; the tokens
are read in the first layer and in every `every`-th behind it. The queries of an image see those of the same image. An
image with fewer tokens than there are queries takes the first ones alone. Weights bear the names of transformers'
`Blip2QFormerModel`, beside `query_tokens` and `project`.

Memory:  O(B H K (K + V)).

Reference: BLIP-2, arXiv 2301.12597, equations from its text; B-VLLM, arXiv 2412.09919, whose spatial sampler it is.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tvc.errors import WeightsError
from tvc.kernels.op import Scope, Tap, primitive
from tvc.kernels.segment_attention import segment_attention
from tvc.kernels.segment_pool import CountedPooling
from tvc.kernels.segments import per_token, ranks
from tvc.kernels.weights import Shape

EPSILON = 1e-12
Tensors = dict[str, torch.Tensor]


@primitive
class QFormer(CountedPooling):
    """Trained queries read the tokens of an image through a Q-Former; each becomes one token, and the others leave."""

    key: ClassVar[str] = "qformer"
    heads: int = Field(12, ge=1, description="heads of the attentions; they divide the width of the queries")
    layers: int = Field(12, ge=1, le=99, description="layers of the Q-Former")
    every: int = Field(2, ge=1, description="the tokens are read in the first layer and every so many behind it")

    def taps(self) -> dict[str, Tap]:
        return self.module()

    def shapes(self, width: int | str) -> dict[str, Shape]:
        hidden, inner = "hidden", "inner"
        found: dict[str, Shape] = {
            "query_tokens": (1, self.keep.count or "queries", hidden),
            "project.weight": (width, hidden),
            "project.bias": (width,),
        }

        def linear(name: str, into: int | str, out_of: int | str) -> None:
            found[f"{name}.weight"], found[f"{name}.bias"] = (into, out_of), (into,)

        def norm(name: str) -> None:
            found[f"{name}.weight"] = found[f"{name}.bias"] = (hidden,)

        norm("layernorm")
        for layer in range(self.layers):
            front = f"encoder.layer.{layer}"
            reads = [("attention", hidden), *([("crossattention", width)] if layer % self.every == 0 else [])]
            for attention, seen in reads:
                linear(f"{front}.{attention}.attention.query", hidden, hidden)
                linear(f"{front}.{attention}.attention.key", hidden, seen)
                linear(f"{front}.{attention}.attention.value", hidden, seen)
                linear(f"{front}.{attention}.output.dense", hidden, hidden)
                norm(f"{front}.{attention}.output.LayerNorm")
            linear(f"{front}.intermediate_query.dense", inner, hidden)
            linear(f"{front}.output_query.dense", hidden, inner)
            norm(f"{front}.output_query.LayerNorm")
        return found

    def tensors(self) -> Tensors:
        weights = super().tensors()
        width = weights["query_tokens"].shape[2]
        if width % self.heads:
            raise WeightsError(
                "the queries do not fit their policy",
                where=str(self.weights),
                got=f"{self.heads} heads, {width} wide",
                want="heads that divide the width",
                fix="name weights that were trained for this policy, or change its settings",
                slug="queries-mismatch",
            )
        return weights

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, weights: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen, sizes = self.placed(size, scope)
        own = torch.where(chosen < 0, -1, per_token(scope.segment, chosen))  # [B, K] segment of each query
        there = (own[:, :, None] == torch.arange(scope.counts.shape[1], device=own.device)).sum(1)
        queries = weights["query_tokens"][0].float()
        place = ranks(own, there).clamp(min=0, max=queries.shape[0] - 1)
        made = _norm(torch.nn.functional.embedding(place, queries), weights, "layernorm")
        tokens = feature.float()
        for layer in range(self.layers):
            front = f"encoder.layer.{layer}"
            parts = (self._heads(made, weights, f"{front}.attention.attention.{name}") for name in _PARTS)
            made = _added(made, segment_attention.overload(*parts, own, own), weights, f"{front}.attention.output")
            if layer % self.every == 0:
                read = self._read(made, tokens, own, scope.segment, weights, f"{front}.crossattention.attention")
                made = _added(made, read, weights, f"{front}.crossattention.output")
            inner = torch.nn.functional.gelu(_linear(made, weights, f"{front}.intermediate_query.dense"))
            made = _added(made, inner, weights, f"{front}.output_query")
        made = torch.where((own >= 0)[:, :, None], _linear(made, weights, "project"), 0.0)
        return chosen, made.to(feature.dtype), sizes

    def _heads(self, rows: torch.Tensor, weights: Tensors, name: str) -> torch.Tensor:
        """[B, H, ..., d] a linear layer's output, head by head."""
        return _linear(rows, weights, name).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _read(
        self,
        made: torch.Tensor,
        tokens: torch.Tensor,
        own: torch.Tensor,
        segment: torch.Tensor,
        weights: Tensors,
        name: str,
    ) -> torch.Tensor:
        """[B, K, hidden] what each query takes of the tokens of its segment; pads take nothing."""
        query = self._heads(made, weights, f"{name}.query")
        key, value = (self._heads(tokens, weights, f"{name}.{part}") for part in _PARTS[1:])
        read: torch.Tensor = segment_attention.overload(query, key, value, own, segment)
        return read


_PARTS = ("query", "key", "value")


def _linear(rows: torch.Tensor, weights: Tensors, name: str) -> torch.Tensor:
    return rows @ weights[f"{name}.weight"].float().T + weights[f"{name}.bias"].float()


def _norm(rows: torch.Tensor, weights: Tensors, name: str) -> torch.Tensor:
    weight, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
    return torch.nn.functional.layer_norm(rows, (rows.shape[-1],), weight, bias, EPSILON)


def _added(rows: torch.Tensor, more: torch.Tensor, weights: Tensors, name: str) -> torch.Tensor:
    """The norm of `rows` and of what an output layer makes of `more`."""
    return _norm(rows + _linear(more, weights, f"{name}.dense"), weights, f"{name}.LayerNorm")
