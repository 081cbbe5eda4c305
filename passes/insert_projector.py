"""A cut behind the projector: a small component that gets packed visual features and gives fewer of them."""

from __future__ import annotations

from typing import Any

import torch

from tvc.errors import SiteError
from tvc.graphs import identifier, open_draft
from tvc.kernels.op import Tap
from tvc.kernels.segments import take_rows
from tvc.passes.reduction import decide
from tvc.passes.retrace import SAMPLED
from tvc.passes.taps import crosses, crossing, tap_name
from tvc.program import Change, Component, Program

AUTO = torch.export.Dim.AUTO


class ProjectorCut(torch.nn.Module):
    """Inputs visual_features [B, V, D], visual_segment [B, V], visual_counts [B, N], then taps by visual token."""

    def __init__(self, step: Any, taps: dict[str, int]):
        super().__init__()
        self.step, self.taps = step, list(taps)
        self.weights: dict[str, dict[str, str]] = {}  # group -> name of a weight -> its attribute here
        parts = {str(index): term.primitive for index, term in enumerate(step.score)} | step.parts()
        for group, primitive in parts.items():
            for tap in primitive.taps().values():
                for name, tensor in tap.tensors().items() if tap.tensors is not None else ():
                    attribute = identifier(f"weights.projector.{group}.{name}")
                    self.register_buffer(attribute, tensor)
                    self.weights.setdefault(group, {})[name] = attribute

    def forward(
        self, features: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, *taps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = dict(zip(self.taps, taps, strict=True))
        place = torch.arange(segment.shape[1], device=segment.device).expand(segment.shape[0], -1)
        ordinal = torch.where(segment >= 0, place, -1)

        def value(tap: Tap, group: str, name: str) -> Any:
            if crosses(tap):
                return given[tap_name(self.step, group, name)]
            if tap.kind == "weights":
                return {name: getattr(self, attribute) for name, attribute in self.weights[group].items()}
            if tap.kind in ("feature", "ordinal"):
                return features if tap.kind == "feature" else ordinal
            raise SiteError(
                f"there is no {tap.kind} at the projector",
                where=self.step.where,
                got=f"{tap.kind} of {tap.layer or 'projector'}",
                want="features of the visual tokens, or a value of a vision layer",
                fix="name a vision layer, or act at a language site",
                slug="no-such-tap",
            )

        scores: list[Any] = []
        for index, term in enumerate(self.step.score):
            wanted = term.primitive.taps()
            if any(crosses(tap) for tap in wanted.values()):
                scores.append(given[tap_name(self.step, "score", str(index))])
            else:
                scores.append({name: value(tap, str(index), name) for name, tap in wanted.items()})
        values = {
            group: {name: value(tap, group, name) for name, tap in primitive.taps().items()}
            for group, primitive in self.step.parts().items()
        }
        size = torch.ones_like(segment, dtype=torch.float32)
        decision = decide(self.step, features, size, segment, counts, scores, values)
        kept = take_rows(features, decision.chosen) if decision.feature is None else decision.feature
        return kept.to(features.dtype), decision.chosen


def add_projector(program: Program, step: Any) -> list[Change]:
    """Adds the component `projector`, whose outputs are the features that stay and their numbers, -1 pads."""
    if step.exit is not None:
        raise SiteError(
            "an exit belongs into the decoder",
            where=step.where,
            got=f"exit at {step.at}",
            want="exit at a language site",
            fix="write at: language.0",
            slug="exit-outside-decoder",
        )
    shape = program.components["decoder"].meta["shape"]
    widths = {name: program.components["vision"].meta["tap_widths"][name] for name, _, _ in crossing(step)}
    visual = SAMPLED
    segment = (torch.arange(visual) >= visual // 2).long().repeat(2, 1)
    counts = torch.full((2, 2), visual // 2)
    features = torch.rand(2, visual, shape.width, dtype=shape.dtype)
    taps = [torch.rand(2, visual, width) if width else torch.rand(2, visual) for width in widths.values()]
    sample = tuple(t.to(shape.device) for t in (features, segment, counts, *taps))
    dynamic = tuple({0: AUTO, 1: AUTO} for _ in sample)
    names = ("visual_features", "visual_segment", "visual_counts", *widths)
    shapes = (*dynamic[:3], dynamic[3:]) if taps else dynamic
    with torch.no_grad():
        cut = ProjectorCut(step, widths).to(shape.device)
        exported = torch.export.export(cut, sample, dynamic_shapes=shapes, strict=False)
    component = Component("projector", exported, names, ("reduced_features", "chosen"), sample, dynamic)
    component.meta["tap_widths"] = widths
    component.draft = open_draft(component)
    program.components["projector"] = component
    return [Change("projector", "projector", "reduction behind the projector", step.where)]
