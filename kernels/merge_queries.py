"""Queries: trained queries attend to the places of an image's grid, and each becomes one new token.

As keys are made of places alone, the attention depends on no image: it is a constant table [H, places, queries], which
is computed once, when the policy is compiled (`fold: true`), or in the graph at every call.

    query = W_q n_q(queries + places_M) + b_q     key = W_k n_k(places_P) + b_k     value = W_v n_v(x) + b_v
    new token = project(W_o [softmax(query key^T / sqrt(d)) value] + b_o)

`places_M` is a table of sines and cosines over a square grid of as many places as there are queries (half of the width
for the column, half for the row), `places_P` the same table, enlarged to the image's grid by bicubic interpolation; `n`
are layer norms with an epsilon of 1e-6. The first `keep` queries are those that any number uses.

Reference: MQT, arXiv 2405.19315; code gordonhu608/MQT-LLaVA@92c35d0 (read, not copied). Deviation: it acts on projected
features; published, on the encoder's, in the place of the projector.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from tvc.errors import WeightsError
from tvc.kernels.op import Scope, Tap, primitive
from tvc.kernels.segment_pool import CountedPooling, GridPooling, by_place
from tvc.kernels.weights import Shape

EPSILON = 1e-6


def sines(side: int, width: int) -> torch.Tensor:
    """[side * side, width] float32, row by row: the column's sines and cosines, then the row's."""
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)
    down, across = one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)
    return torch.cat([across, down], 2).reshape(side * side, width).float()


def enlarged(table: torch.Tensor, columns: int) -> torch.Tensor:
    """[columns * columns, D] float32: a table of a square grid for a grid of another side."""
    side = math.isqrt(table.shape[0])
    image = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    sized = torch.nn.functional.interpolate(image, (columns, columns), mode="bicubic", align_corners=False)
    return sized.permute(0, 2, 3, 1).reshape(columns * columns, -1)


def place_logits(weights: dict[str, torch.Tensor], heads: int) -> torch.Tensor:
    """[H, P, M] float32: what each query makes of each place, before the softmax over places."""
    width = weights["queries"].shape[1]

    def mapped(rows: torch.Tensor, norm: str, part: int) -> torch.Tensor:
        rows = _norm(rows, weights, norm)
        weight = weights["attention.in_proj_weight"].float()[part * width : (part + 1) * width]
        bias = weights["attention.in_proj_bias"].float()[part * width : (part + 1) * width]
        return (rows @ weight.T + bias).unflatten(1, (heads, -1)).transpose(0, 1)

    query = mapped(weights["queries"].float() + weights["places.queries"], "norm_query", 0)
    key = mapped(weights["places.image"], "norm_key", 1)
    return key @ query.transpose(1, 2) / math.sqrt(width // heads)


def _norm(rows: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    weight, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
    return torch.nn.functional.layer_norm(rows.float(), (rows.shape[-1],), weight, bias, EPSILON)


@primitive
class Queries(CountedPooling, GridPooling):
    """Trained queries attend to the places of each image's grid; each becomes one token, and the others leave."""

    key: ClassVar[str] = "queries"
    heads: int = Field(16, ge=1, description="heads of the attention; they divide the width")
    fold: bool = Field(True, description="make the attention a constant when the policy is compiled")

    def taps(self) -> dict[str, Tap]:
        return self.module()

    def shapes(self, width: int | str) -> dict[str, Shape]:
        thrice = 3 * width if isinstance(width, int) else f"3 {width}"
        norms = [f"norm_{name}.{part}" for name in ("query", "key", "value") for part in ("weight", "bias")]
        return {
            "queries": ("queries", width),
            **dict.fromkeys(norms, (width,)),
            "attention.in_proj_weight": (thrice, width),
            "attention.in_proj_bias": (thrice,),
            "attention.out_proj.weight": (width, width),
            "attention.out_proj.bias": (width,),
            "project.weight": (width, width),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights and the tables of places; folded, the table of logits and what is left of the weights."""
        weights, columns = super().tensors(), self.columns or 1
        number, width = weights["queries"].shape
        side = math.isqrt(number)
        most = self.keep.count or self.keep.kept(columns * columns)
        for ok, got, want in (
            (side * side == number, f"{number} queries", "a square number of queries, as they stand for a grid"),
            (most <= number, f"keep {self.keep}, and {number} queries", "as many queries as tokens that stay"),
            (
                width % (4 * self.heads) == 0,
                f"{self.heads} heads, {width} wide",
                "4 * heads that divide the width",
            ),
        ):
            if not ok:
                raise WeightsError(
                    "the queries do not fit their policy",
                    where=str(self.weights),
                    got=got,
                    want=want,
                    fix="name weights that were trained for this policy, or change its settings",
                    slug="queries-mismatch",
                )
        table = sines(side, width)
        weights = {**weights, "places.queries": table, "places.image": enlarged(table, columns)}
        if not self.fold:
            return weights
        gone = ("queries", "places", "norm_query", "norm_key")
        rest = {name: value for name, value in weights.items() if not name.startswith(gone)}
        with torch.no_grad():
            rest["logits"] = place_logits(weights, self.heads)
        for name in ("attention.in_proj_weight", "attention.in_proj_bias"):
            rest[name] = rest[name][2 * width :].clone()
        return rest

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = feature.shape[2]
        logits = weights["logits"] if "logits" in weights else place_logits(weights, self.heads)
        if self.keep.count is not None:
            logits = logits[:, :, : self.keep.count]
        inner, offset = weights["attention.in_proj_weight"].float(), weights["attention.in_proj_bias"].float()
        value = _norm(feature, weights, "norm_value") @ inner[-width:].T + offset[-width:]
        logits = by_place(logits, scope.segment, scope.counts)
        chosen, pooled, sizes = self.pooled(logits, value, size, scope)
        outer = weights["attention.out_proj.weight"].float().T
        made = (pooled @ outer + weights["attention.out_proj.bias"].float()) @ weights["project.weight"].float().T
        return chosen, made.to(feature.dtype), sizes
