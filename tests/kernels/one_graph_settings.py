"""A graph of further settings of the primitives in `one_graph.py`, and of those whose lowering is long."""

from __future__ import annotations

from typing import Any

import torch
from kernel_one_graph import HEAD_WIDTH, OP, Inputs, OneGraph

from tvc.kernels.budget import Budget
from tvc.kernels.exit_select import exit_chosen
from tvc.kernels.merge_bipartite import Bipartite
from tvc.kernels.op import Attention, Scope
from tvc.kernels.rest_absorb import Absorb
from tvc.kernels.rest_cluster import Cluster
from tvc.kernels.rest_merge import Merge
from tvc.kernels.score_attention import AttentionScore
from tvc.kernels.score_global import GlobalScore
from tvc.kernels.score_norm import NormScore
from tvc.kernels.select_chunks import Chunks
from tvc.kernels.select_outliers import Outliers
from tvc.kernels.select_pivots import Pivots
from tvc.kernels.select_stride import Stride
from tvc.kernels.select_top import Top
from tvc.kernels.when_threshold import ThresholdGate


class SettingsGraph(OneGraph):
    """`labels` names the outputs in order."""

    labels: tuple[str, ...] = ()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = Inputs(*tensors)
        scope, words = Scope(at.segment, at.counts, at.counts.shape[1]), (at.text, at.text_index >= 0)
        mask = OP.attention_mask(at.query_positions, at.key_positions, 0)
        bundle = Attention(at.query, at.key, mask, at.rows, at.columns, HEAD_WIDTH**-0.5)
        out: dict[str, torch.Tensor] = {}
        score = self.further_scores(at, bundle, out)
        out["select.stride.count"] = Stride(keep=Budget(count=3)).apply(None, scope)
        outliers = out["select.outliers"] = Outliers(keep=Budget(count=2), fence=0.0).apply(score, scope)
        out["select.chunks"] = Chunks(keep=Budget(count=3), number=3).apply(score, scope, at.feature)
        for label, budget in (("count", 3), ("share", "40%")):
            pivots = Pivots(keep=Budget.model_validate(budget), visual=2, text=2)
            out[f"select.pivots.{label}"] = pivots.apply(None, scope, at.feature, words, bundle)
        for reduce in ("mean", "sum"):
            gate = ThresholdGate(reduce=reduce, above=0.45)
            out[f"when.{reduce}"], out[f"exit.{reduce}"] = gate.apply(score, scope), exit_chosen(gate, score, scope)
        chosen = Top(keep=Budget(count=3)).apply(score, scope)
        made = {
            "cluster": Cluster(pool=Budget(permille=600), per=3).apply(at.feature, at.size, chosen, score, scope),
            "absorb": Absorb(neighbours=2).apply(at.feature, at.size, outliers, score, scope),
        }
        rules: dict[str, Any] = {
            "stride": {"targets": {"stride": 2}, "by": "key_cosine", "reduce": "target_mean"},
            "share": {"targets": {"stride": "30%"}, "reduce": "mean"},
        }
        for label, rule in rules.items():
            merge = Merge.model_validate(rule)
            metric = {"metric": at.metric} if merge.taps() else {}
            made[f"merge.{label}"] = merge.apply(at.feature, at.size, chosen, score, scope, **metric)
        pairs: dict[str, Any] = {
            "half": {"keep": "50%", "reduce": "mean"},
            "most": {"keep": "80%"},
            "remove": {"remove": 2},
        }
        for label, rule in pairs.items():
            made[f"bipartite.{label}"] = Bipartite.model_validate(rule).apply(at.feature, at.size, scope)
        for label, parts in made.items():
            for name, part in zip(("index", "feature", "size"), parts, strict=True):
                # A rule that moves no token gives back the selection itself.
                out[f"{label}.{name}"] = part.clone() if part is outliers else part
        type(self).labels = tuple(out)
        return tuple(out.values())

    def further_scores(self, at: Inputs, bundle: Attention, out: dict[str, torch.Tensor]) -> torch.Tensor:
        visual = bundle._replace(rows=at.visual_index)
        every = torch.arange(at.query.shape[2], device=at.query.device).expand(at.query.shape[0], -1)
        out["score.attention.sum"] = AttentionScore(heads="sum").apply(bundle._replace(columns=at.pairs, mask=None))
        out["score.attention.max"] = AttentionScore(heads="max").apply(bundle)
        out["score.attention.joined.visual"] = AttentionScore(of="visual", heads="joined").apply(visual)
        out["score.attention.all"] = AttentionScore(of="all").apply(bundle._replace(rows=every))
        out["score.global.visual"] = GlobalScore(above=1.0).apply(visual)
        for order in (1.0, 3.0):
            out[f"score.norm.{order:g}"] = NormScore(order=order).apply(at.metric)
        return out["score.norm.1"]
