"""Every op and primitive in one module, so that a single export proves all of them at sizes it was not traced with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from tvc.kernels.budget import Budget
from tvc.kernels.combine_scores import combine
from tvc.kernels.exit_select import exit_chosen
from tvc.kernels.grid import neighbours_by_columns
from tvc.kernels.merge_bipartite import Bipartite
from tvc.kernels.merge_frame_windows import FrameWindows
from tvc.kernels.merge_repeats import Repeats
from tvc.kernels.merge_resize import Resize
from tvc.kernels.merge_scenes import Scenes
from tvc.kernels.merge_windows import Windows
from tvc.kernels.op import Attention, Scope
from tvc.kernels.rest_absorb import Absorb
from tvc.kernels.rest_anchor_frames import AnchorFrames
from tvc.kernels.rest_cells import Cells
from tvc.kernels.rest_fold import Fold
from tvc.kernels.rest_merge import Merge
from tvc.kernels.rest_recycle import Recycle
from tvc.kernels.score_attention import AttentionScore
from tvc.kernels.score_change import ChangeScore
from tvc.kernels.score_cosine import CosineScore
from tvc.kernels.score_global import GlobalScore
from tvc.kernels.score_mean_query import MeanQueryScore
from tvc.kernels.score_norm import NormScore
from tvc.kernels.score_novelty import NoveltyScore
from tvc.kernels.score_pagerank import PageRankScore
from tvc.kernels.score_peak import PeakScore
from tvc.kernels.score_random import RandomScore
from tvc.kernels.score_uniform import UniformScore
from tvc.kernels.select_afford import Afford
from tvc.kernels.select_anchors import Anchors
from tvc.kernels.select_coverage import Coverage
from tvc.kernels.select_density import Density
from tvc.kernels.select_either import Either
from tvc.kernels.select_every import Every
from tvc.kernels.select_frames import FrameSelect
from tvc.kernels.select_log_det import LogDet
from tvc.kernels.select_max_min import MaxMin
from tvc.kernels.select_max_sum import MaxSum
from tvc.kernels.select_medoids import Medoids
from tvc.kernels.select_outliers import Outliers
from tvc.kernels.select_pairs import Pairs
from tvc.kernels.select_recover import Recover
from tvc.kernels.select_regions import Regions
from tvc.kernels.select_rows import Rows
from tvc.kernels.select_spectral import Spectral
from tvc.kernels.select_stride import Stride
from tvc.kernels.select_threshold import Threshold
from tvc.kernels.select_top import Top
from tvc.kernels.when_always import Always
from tvc.kernels.when_cross_attention import CrossAttention
from tvc.kernels.when_threshold import ThresholdGate
from tvc.passes.chunk_attention import chunk_of_slots
from tvc.passes.taps import frames_of, grid_by_position, rows_by_position
from tvc.passes.unrotate_keys import raw_pairs

OP = torch.ops.tvc
WIDTH, HEADS, GROUPS, HEAD_WIDTH = 12, 4, 2, 8


@dataclasses.dataclass
class Inputs:
    """What a cut sees of one chunk: B samples, V visual and T text tokens, N images, P cached tokens."""

    text_index: torch.Tensor
    visual_index: torch.Tensor
    segment: torch.Tensor
    counts: torch.Tensor
    ordinal: torch.Tensor
    feature: torch.Tensor
    metric: torch.Tensor
    size: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_positions: torch.Tensor
    key_positions: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    pairs: torch.Tensor
    text: torch.Tensor
    boundaries: torch.Tensor
    vectors: torch.Tensor

    def chunk(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.visual_index, self.segment, self.counts

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def names() -> list[str]:
    return [field.name for field in dataclasses.fields(Inputs)]


def make(images: list[list[int]], text: list[int], past: int = 0, seed: int = 0) -> Inputs:
    """Inputs of a batch: visual tokens per image and text tokens per sample; slots are left-packed, text comes last."""
    generator = torch.Generator().manual_seed(seed)
    batch, visual = len(images), max(sum(sample) for sample in images)
    slots = max(sum(sample) + words for sample, words in zip(images, text, strict=True))
    number = max(len(sample) for sample in images)
    text_index = torch.full((batch, max(text)), -1)
    visual_index, segment, ordinal = (torch.full((batch, visual), -1) for _ in range(3))
    counts = torch.zeros(batch, number, dtype=torch.int64)
    positions = torch.full((batch, slots), -1)
    for b, (sample, words) in enumerate(zip(images, text, strict=True)):
        seen = sum(sample)
        start = slots - seen - words
        positions[b, start:] = torch.arange(past, past + seen + words)
        text_index[b, max(text) - words :] = torch.arange(start + seen, slots)
        visual_index[b, visual - seen :] = torch.arange(start, start + seen)
        ordinal[b, visual - seen :] = torch.arange(seen)
        numbers = torch.tensor(sample, dtype=torch.int64)
        segment[b, visual - seen :] = torch.repeat_interleave(torch.arange(len(sample)), numbers)
        counts[b, : len(sample)] = numbers

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    cached = torch.arange(past).expand(batch, -1)
    columns = torch.where(visual_index < 0, -1, visual_index + past)[:, :, None]
    return Inputs(
        text_index=text_index,
        visual_index=visual_index,
        segment=segment,
        counts=counts,
        ordinal=ordinal,
        feature=draw(batch, visual, WIDTH),
        metric=draw(batch, visual, HEAD_WIDTH),
        size=torch.ones(batch, visual),
        query=draw(batch, HEADS, slots, HEAD_WIDTH),
        key=draw(batch, GROUPS, past + slots, HEAD_WIDTH),
        value=draw(batch, GROUPS, past + slots, HEAD_WIDTH),
        query_positions=positions,
        key_positions=torch.cat([cached, positions], dim=1),
        rows=text_index.clone(),
        columns=columns,
        pairs=torch.cat([columns, (columns - 1).clamp(min=-1)], dim=2),
        text=draw(batch, max(text), WIDTH),
        boundaries=torch.tensor([0, slots // 2, slots], dtype=torch.int32),
        vectors=draw(1, HEADS, slots, HEAD_WIDTH),
    )


class OneGraph(torch.nn.Module):
    """Calls every op; `labels` names the outputs in order."""

    labels: tuple[str, ...] = ()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = Inputs(*tensors)
        out: dict[str, torch.Tensor] = {}
        scope = Scope(at.segment, at.counts, at.counts.shape[1])
        mask = OP.attention_mask(at.query_positions, at.key_positions, 0)
        out["attention_mask"] = mask
        out["attention_mask.window"] = OP.attention_mask(at.query_positions, at.key_positions, 3)
        first = at.query_positions - at.query_positions % 4
        spans = torch.stack([first, first + 3], 2)
        for window in (0, 3):
            masked = OP.attention_mask(at.query_positions, at.key_positions, window, spans)
            out[f"attention_mask.spans.{window}"] = masked
        out["attention"] = OP.attention(at.query, at.key, at.value, mask, HEAD_WIDTH**-0.5, 0.0)
        out["attention.softcap"] = OP.attention(at.query, at.key, at.value, mask, HEAD_WIDTH**-0.5, 5.0)
        own = at.key[:, :, at.key.shape[2] - at.query.shape[2] :]
        out["unrotated_keys"] = OP.unrotated_keys(own, -own, at.visual_index)
        pairs = raw_pairs(at.key_positions % 3 == 1, at.visual_index, at.query_positions)
        raw = (at.query.flip(3), at.key.flip(3), pairs, HEAD_WIDTH**-0.5)
        for cap in (0.0, 5.0):
            out[f"unrotated_attention.{cap}"] = OP.unrotated_attention(at.query, at.key, at.value, mask, *raw, cap)
        runs = out["attention_runs"] = OP.attention_runs(at.key_positions)
        places = (at.query_positions, at.key_positions, runs)
        out["attend"] = OP.attend(at.query, at.key, at.value, *places, HEAD_WIDTH**-0.5)
        rated = (*places[:2], at.rows, at.columns, HEAD_WIDTH**-0.5)
        out["attend_score"] = OP.attend_score(at.query, at.key, *rated, "mean")
        out["packed_attention"] = OP.packed_attention(at.vectors, at.vectors, at.vectors, at.boundaries, 0.25)
        scores = self.scores(at, mask, out)
        self.selections(at, scores, scope, out)
        self.merges(at, scores, scope, out)
        self.between_layers(at, mask, scores, scope, out)
        self.videos(at, scores, scope, out)
        type(self).labels = tuple(out)
        return tuple(out.values())

    def scores(self, at: Inputs, mask: torch.Tensor, out: dict[str, torch.Tensor]) -> torch.Tensor:
        bundle = Attention(at.query, at.key, mask, at.rows, at.columns, HEAD_WIDTH**-0.5)
        out["score.attention"] = AttentionScore(of="text").apply(bundle)
        out["score.attention.joined"] = AttentionScore(heads="joined").apply(bundle)
        text = (at.text, at.text_index >= 0)
        out["score.cosine.mean"] = CosineScore().apply(feature=at.feature, ordinal=at.ordinal)
        out["score.cosine.text"] = CosineScore(to="text").apply(feature=at.feature, text=text)
        out["score.cosine.last"] = CosineScore(to="last").apply(feature=at.feature, text=text)
        out["score.norm.2"] = NormScore().apply(at.metric)
        out["score.random"] = RandomScore(seed=2**40).apply(at.ordinal)
        out["score.uniform"] = UniformScore().apply(at.ordinal)
        modes = ("none", "minmax", "softmax", "sum")
        parts = zip(("score.cosine.text", "score.norm.2", "score.random", "score.attention"), modes, strict=True)
        mixed = combine([(out[name], 0.25, mode) for name, mode in parts], at.segment)
        out["score.combined"] = mixed
        return mixed

    def selections(self, at: Inputs, score: torch.Tensor, scope: Scope, out: dict[str, torch.Tensor]) -> None:
        for label, budget in (
            ("count", 3),
            ("share", "40%"),
            ("nearest", {"share": "3/7", "round": "nearest"}),
            ("up", {"share": "25%", "round": "up"}),
        ):
            out[f"select.top.{label}"] = Top(keep=Budget.model_validate(budget)).apply(score, scope)
        out["select.stride"] = Stride(keep=Budget(permille=400)).apply(None, scope)
        out["select.threshold"] = Threshold(above=0.3).apply(score, scope)
        out["select.threshold.relative"] = Threshold(relative=0.8).apply(score, scope)
        out["select.outliers"] = Outliers(keep=Budget(permille=600), fence=0.5, spread=3).apply(score, scope)
        anchors = Anchors(keep=Budget(permille=600), share=1000, columns=2)
        anchored = anchors.joined([out["score.random"], out["score.cosine.text"]], scope)
        out["score.anchored"], out["select.anchors"] = anchored, anchors.apply(anchored, scope)
        out["select.rows"] = Rows(keep=Budget(permille=600), columns=2).apply(score, scope)
        count, share = Budget(count=3), Budget(permille=400)
        out["select.max_min"] = MaxMin(keep=share).apply(None, scope, at.feature)
        out["select.max_sum"] = MaxSum(keep=count).apply(score, scope, at.feature)
        out["select.log_det"] = LogDet(keep=share).apply(score.sigmoid(), scope, at.feature)
        gate = ThresholdGate(reduce="max", above=0.45)
        out["when.max"], out["exit.max"] = gate.apply(score, scope), exit_chosen(gate, score, scope)
        out["exit.below"] = exit_chosen(ThresholdGate(below=1e6), score, scope)
        out["exit.always"] = exit_chosen(Always(), None, scope)
        for label in ("select.top.share", "exit.max"):
            chosen = out[label]
            index = (at.text_index, at.visual_index)
            residual, slots = at.query.mean(1), at.query_positions
            chunk = (slots, slots, *index, scope.segment, scope.counts, scope.segment)
            merged = None if label == "exit.max" else residual[:, :1].expand(-1, chosen.shape[1], -1) + 1.0
            parts = OP.shorten(chosen, residual, merged, *chunk)
            for number, part in enumerate(parts):
                out[f"shorten.{label}.{number}"] = part
            out[f"restore.{label}"] = OP.restore(residual, parts[-1], 2 * parts[0])
            out[f"evict.places.{label}"] = OP.evict(at.key_positions, parts[-1], slots)
            out[f"evict.keys.{label}"] = OP.evict(at.key, parts[-1], slots)
        past = at.key_positions.shape[1] - at.query_positions.shape[1]
        paid, visual = at.key.mean((1, 3)).sigmoid(), at.key_positions % 3 > 0
        before, single = paid[:, :past].flip(1) * visual[:, :past], at.query_positions[:, -1] % 2 == 0
        for label, last in (("whole", None), ("last", before > 0.5)):
            parts = OP.reselect(paid, before, last, visual, single, 300, 0, 0.9)
            out[f"reselect.{label}.chosen"], out[f"reselect.{label}.seen"] = parts

    def merges(self, at: Inputs, score: torch.Tensor, scope: Scope, out: dict[str, torch.Tensor]) -> None:
        rules: dict[str, Any] = {
            "kept": {"targets": "kept", "reduce": "size_weighted"},
            "top": {"targets": {"top": 2}, "reduce": "mean"},
        }
        for label, rule in rules.items():
            # `top` starts from a selection whose size is known at run time alone.
            chosen = out["select.threshold" if label == "top" else "select.top.count"]
            parts = Merge.model_validate(rule).apply(at.feature, at.size, chosen, score, scope)
            for name, part in zip(("index", "feature", "size"), parts, strict=True):
                out[f"merge.{label}.{name}"] = part
        joining = Bipartite.model_validate({"keep": "30%", "by": "key_cosine"})
        parts = joining.apply(at.feature, at.size, scope, metric=at.metric)
        for name, part in zip(("index", "feature", "size"), parts, strict=True):
            out[f"bipartite.{name}"] = part
        rests: dict[str, Any] = {
            "absorb": (Absorb(neighbours=2, extra=True), "select.top.count"),
            "cells": (Cells(cells=2, columns=3), "select.top.share"),
            "fold": (Fold(), "select.top.count"),
        }
        for label, (rest, selected) in rests.items():
            parts = rest.apply(at.feature, at.size, out[selected], score, scope)
            for name, part in zip(("index", "feature", "size"), parts, strict=True):
                # A rest rule that moves no token gives back the selection itself.
                out[f"{label}.{name}"] = part.clone() if part is out[selected] else part

    def between_layers(
        self, at: Inputs, mask: torch.Tensor, score: torch.Tensor, scope: Scope, out: dict[str, torch.Tensor]
    ) -> None:
        bundle = Attention(at.query, at.key, mask, at.rows, at.columns, HEAD_WIDTH**-0.5)
        words = (at.text, at.text_index >= 0)
        out["transition"] = OP.transition_score(at.text, at.text.flip(1), at.text_index >= 0)
        out["raters"] = OP.text_raters(at.feature, at.segment >= 0, *words)
        gate = CrossAttention(below=0.7)
        out["when.cross_attention"] = gate.apply(None, scope, bundle, bundle._replace(rows=at.visual_index))

    def videos(self, at: Inputs, score: torch.Tensor, scope: Scope, out: dict[str, torch.Tensor]) -> None:
        frames = frames_of(torch.stack([at.query_positions // 4, at.query_positions % 2]), *at.chunk())
        out["frames.number"], out["frames.place"] = frames
        out["score.change"] = ChangeScore(window=4).apply(scope, at.feature, frames)
        chunks = chunk_of_slots(frames, at.visual_index, at.query_positions, 2)
        places = (at.query_positions, at.key_positions)
        out["attention_mask.chunks"] = OP.attention_mask(*places, 0, None, chunks, 1)
        whole = out["whole_chunks"] = OP.whole_chunks(frames[0], score, 2, 1, 0, 1)
        entry, kept = OP.pool_entries(at.query_positions, at.visual_index, frames[0], whole, 3)
        out["pool_entries.entry"], out["pool_entries.kept"] = entry, kept
        out["pool_cache"] = OP.pool_cache(at.key, entry, kept)
        rule = {"keep": "40%", "window": 4, "bug_compatible": True}
        out["select.frames"] = FrameSelect.model_validate(rule).apply(score, scope, frames)


class MoreGraph(OneGraph):
    """The ops whose lowering takes long, in a graph of their own, and further settings of others."""

    labels: tuple[str, ...] = ()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = Inputs(*tensors)
        scope, words = Scope(at.segment, at.counts, at.counts.shape[1]), (at.text, at.text_index >= 0)
        mask = OP.attention_mask(at.query_positions, at.key_positions, 0)
        every = torch.where(at.query_positions < 0, -1, torch.arange(at.query.shape[2], device=at.query.device))
        bundle = Attention(at.query, at.key, mask, every, at.columns, HEAD_WIDTH**-0.5)
        score = NormScore().apply(at.metric)
        out = {"score.mean_query": MeanQueryScore().apply(scope, at.feature, bundle)}
        frames = frames_of(torch.stack([at.query_positions // 4, at.query_positions % 2]), *at.chunk())
        out["score.change"] = ChangeScore().apply(scope, at.feature, frames)
        flat = frames_of(at.query_positions, *at.chunk())
        out["frames.images"] = flat[0]
        out["score.novelty"] = NoveltyScore().apply(scope, at.feature, flat)
        past = {"total": at.text.mean(1), "frames": at.query_positions.clamp(min=0).amax(1)}
        remembering = NoveltyScore(memory="conversation")
        out["score.novelty.remembered"] = remembering.apply(scope, at.feature, flat, past)
        for name, state in remembering.remembered(at.feature, flat, past).items():
            out[f"memory.{name}"] = OP.remember(past[name], state, at.visual_index)
        rules: dict[str, Any] = {"each": {"keep": "40%"}, "together": {"keep": 3, "together": True}}
        for label, rule in rules.items():
            out[f"select.frames.{label}"] = FrameSelect.model_validate(rule).apply(score, scope, frames)
        out["select.density"] = Density(keep=Budget(permille=600), cutoff=0.5).apply(score, scope, at.metric)
        out["select.medoids"] = Medoids(keep=Budget(count=3)).apply(None, scope, at.feature)
        for label, budget in (("count", 3), ("share", "40%")):
            spectral = Spectral.model_validate({"keep": budget, "sigma": 0.5, "relative": True})
            out[f"select.spectral.{label}"] = spectral.apply(None, scope, at.feature)
        out["spectral_rows"] = OP.spectral_rows(at.feature, at.segment, at.counts, 400, 0, 2.0, False)
        out["select.pairs"] = Pairs(keep=Budget(count=2), drop=1).apply(score, scope, at.feature)
        out["select.coverage"] = Coverage(keep=Budget(count=3)).apply(None, scope, at.feature, words)
        whole = torch.arange(at.query.shape[2], device=at.query.device).expand(at.query.shape[0], -1)
        out["score.global"] = GlobalScore(above=1.0).apply(bundle._replace(rows=whole))
        out["score.pagerank"] = PageRankScore(temperature=0.5).apply(bundle)
        out["score.peak"] = PeakScore().apply(bundle._replace(rows=at.rows))
        out["score.peak.max"] = PeakScore(heads="max").apply(bundle._replace(rows=at.rows))
        either = Either(keep=Budget(count=1), share=0.2, least=0.3)
        out["score.either"] = either.joined([out["score.peak"], out["score.mean_query"], score], scope)
        out["select.either"] = either.apply(out["score.either"], scope)
        self.scenes(at, scope, frames, out)
        share = Budget(permille=600)
        out["select.recover"] = Recover(keep=share, neighbours=2).apply(score, scope, at.feature, words)
        chosen = Top(keep=share).apply(score, scope)
        near = Merge.model_validate({"targets": "kept", "within": 1.1})
        tensors = (at.feature, at.size, chosen, score, scope)
        made = {
            "windows": Windows(side=2, above=-0.2, columns=3).apply(at.feature, at.size, scope),
            "resize": Resize(side=2, how="bilinear", columns=3).apply(at.feature, at.size, scope),
            "recycle": Recycle(neighbours=2, around=2).apply(*tensors, at.metric, words),
            "within": near.apply(*tensors),
            "halving": Merge(reduce="halving").apply(*tensors),
        }
        for label, parts in made.items():
            for name, part in zip(("index", "feature", "size"), parts, strict=True):
                out[f"{label}.{name}"] = part
        self.pictures(at, scope, out)
        self.modules(at, chosen, out)
        type(self).labels = tuple(out)
        return tuple(out.values())

    def pictures(self, at: Inputs, scope: Scope, out: dict[str, torch.Tensor]) -> None:
        places = at.query_positions
        spots = torch.stack([torch.zeros_like(places), places // 4, places % 4])
        grids = {
            "positions": grid_by_position(spots, at.visual_index, at.segment),
            "columns": neighbours_by_columns(at.segment, at.counts, 3),
        }
        rows = rows_by_position(spots, at.visual_index, at.segment)
        anchors = Anchors(keep=Budget(permille=600), share=1000)
        out["score.anchors.told"] = anchors.joined([at.feature[:, :, 0], at.feature[:, :, 1]], scope, rows)
        out["select.rows.told"] = Rows(keep=Budget(permille=600)).apply(at.feature[:, :, 0], scope, rows)
        for label, beside in grids.items():
            out[f"right.{label}"], out[f"below.{label}"] = beside
            rule = Regions.model_validate({"keep": "60%", "within": 4.0})
            out[f"select.regions.{label}"] = rule.apply(None, scope, at.feature, beside)

    def modules(self, at: Inputs, chosen: torch.Tensor, out: dict[str, torch.Tensor]) -> None:
        """Ops that take weights, which are constants here."""

        def weight(*shape: int) -> torch.Tensor:
            return torch.linspace(-1, 1, math.prod(shape), device=at.feature.device).reshape(shape)

        asked, seen, half = at.text_index >= 0, at.segment >= 0, WIDTH // 2
        states = out["text_states"] = OP.text_states(at.text, asked)
        out["exit_logits"] = OP.exit_logits(states, weight(5, 2 * WIDTH), weight(2, 5))
        layers = (weight(6, WIDTH), weight(6, WIDTH), weight(6), weight(1, 6), weight(1))
        out["score.mlp"] = OP.mlp_score(at.feature, states[:, 1], *layers)
        asking = at.text.unflatten(2, (2, half)).transpose(1, 2)
        score = out["cross_score"] = OP.cross_score(asking, at.feature[:, None, :, :half], asked, seen)
        out["share_states"] = OP.share_states(score, at.segment, at.counts)
        out["numbered_keep"] = OP.numbered_keep(score, at.segment, at.counts, (at.counts + 1) // 2)
        place = torch.nn.functional.pad(at.feature, (0, 0, 1, 0))
        kept = place.gather(1, (chosen + 1)[:, :, None].expand(-1, -1, WIDTH)).unflatten(2, (2, half)).transpose(1, 2)
        own = torch.nn.functional.pad(at.segment, (1, 0), value=-1).gather(1, chosen + 1)
        out["segment_attention"] = OP.segment_attention(kept, kept, kept, own, own)
        tokens = at.feature.unflatten(2, (2, half)).transpose(1, 2)
        out["segment_attention.all"] = OP.segment_attention(kept, tokens, tokens, own, at.segment)
        folded = OP.pixel_blocks(at.feature, at.size, at.segment, at.counts, torch.full_like(at.segment, 3), 2)
        for name, part in zip(("index", "rows", "size"), folded, strict=True):
            out[f"pixel_blocks.{name}"] = part
        out["segment_pool"] = OP.segment_pool(at.feature[:, None, :, :4], at.feature, at.segment, at.counts, chosen)

    def scenes(self, at: Inputs, scope: Scope, frames: Any, out: dict[str, torch.Tensor]) -> None:
        rules: dict[str, Any] = {
            "runs": {"by": {"runs": "50%", "neighbours": 2}, "keep": "50%", "spare": 1},
            "windows": {"by": {"windows": 3}, "keep": "40%", "still": "every", "of": "video", "blend": 0.6},
            "cuts": {"by": {"cuts": 2, "below": 0.1}, "keep": "60%", "neighbours": 3},
        }
        for label, rule in rules.items():
            parts = Scenes.model_validate({"above": 0.1, **rule}).apply(at.feature, at.size, scope, frames)
            for name, part in zip(("index", "feature", "size"), parts, strict=True):
                out[f"scenes.{label}.{name}"] = part
        chosen = Top(keep=Budget(permille=300)).apply(at.feature[:, :, 0], scope)
        rest = AnchorFrames.model_validate({"by": {"cuts": 2}, "every": 2, "keep": "40%", "neighbours": 2})
        parts = rest.apply(at.feature, at.size, chosen, None, scope, frames)
        for name, part in zip(("index", "feature", "size"), parts, strict=True):
            out[f"anchor_frames.{name}"] = part
        out["select.every"] = Every(frames=2).apply(None, scope, frames)
        spent = {"frames": frames, "spent": (at.counts, at.counts * 2)}
        for over in (1, 2):
            windows = FrameWindows(group=2, near=1, far=2, columns=2, frames=over)
            parts = windows.apply(at.feature, at.size, scope, frames)
            for name, part in zip(("index", "feature", "size"), parts, strict=True):
                out[f"frame_windows.over{over}.{name}"] = part
        repeats = Repeats.model_validate({"above": 0.1, "cost": "60%", "depth": 8, "before": 2})
        afford = Afford.model_validate({"cost": "50%", "depth": 8, "before": 2})
        out["select.afford"] = afford.apply(at.feature[:, :, 0], scope, spent["spent"])
        parts = repeats.apply(at.feature, at.size, scope, **spent)
        for name, part in zip(("index", "feature", "size"), parts, strict=True):
            out[f"repeats.{name}"] = part
