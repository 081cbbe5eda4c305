"""The plan: what a policy does to one model's token counts, and what those counts cost.

A plan is plain numbers; `tvc.report.schedule` makes it and `tvc.report.cost` prices it. Where a step decides at run
time how many tokens stay (an exit on a threshold, a selection by threshold), a plan holds the most that can stay, and
its `fired` plan the least.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs (a multiply and an add are two) and bytes, for a batch of one.

    `vision` covers patch embedding, encoder blocks and projector; `prefill` the decoder over the whole prompt and one
    row of the output head; `decode` the same for one new token, the mean over the new tokens asked for; `kv_bytes`
    the cache after prefill. Norms, activations and the scores of a policy are left out.
    """

    vision: int
    prefill: int
    decode: float
    kv_bytes: int

    def ratio(self, dense: Cost) -> dict[str, float]:
        """This cost divided by the dense one, per field."""
        fields = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) / getattr(dense, name) if getattr(dense, name) else 1.0 for name in fields}


@dataclasses.dataclass(frozen=True)
class PlanLayer:
    """One decoder layer: the tokens that run through it, and what they cost."""

    index: int
    sites: tuple[str, ...]  # the cuts right before this layer
    visual: int
    text: int
    flops: int  # prefill
    kv_bytes: int
    evicted: int = 0  # visual tokens that leave the layer's cache when the prompt has been read
    unread: int = 0  # visual tokens of the cache that a decode step does not attend to, where it chooses anew

    @property
    def tokens(self) -> int:
        """Visual and text tokens that run through the layer."""
        return self.visual + self.text

    @property
    def held(self) -> int:
        """The layer's KV length after prefill."""
        return self.tokens - self.evicted


@dataclasses.dataclass(frozen=True)
class PlanStage:
    """Consecutive layers of one length; `first` and `last` are both inside."""

    part: str  # `vision` or `language`
    sites: tuple[str, ...]
    first: int
    last: int
    visual: int  # language: visual tokens; vision: all tokens of all tiles
    text: int
    evicted: int = 0  # visual tokens that leave the caches when the prompt has been read

    @property
    def tokens(self) -> int:
        return self.visual + self.text

    @property
    def held(self) -> int:
        """The KV length after prefill."""
        return self.tokens - self.evicted


@dataclasses.dataclass(frozen=True)
class Operators:
    """Operators of one graph that compute: what a runtime that fuses nothing launches. Views are left out."""

    graph: str
    total: int
    added: int  # of them, what the policy's steps added


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens per layer and their cost, dense and compiled.

    `vision_tokens` counts the tokens of all tiles in each block of the vision encoder. `exact` is False where the split
    of a budget between several images depends on their content. `fired` is the plan in which every run-time decision
    removes all it can; None where nothing is decided at run time. `operators` is known once the graphs are there, of
    a freshly compiled model; plans that differ in nothing else are equal. `frames` counts those of each sample image,
    more than one in a video; `alone` names sites (or `cache`) that are about several, and find one.
    """

    model_type: str
    policy: str
    image_size: tuple[int, int]
    visual_tokens: tuple[int, ...]  # of each sample image, untouched
    text_tokens: int
    new_tokens: int
    layers: tuple[PlanLayer, ...]
    vision_tokens: tuple[int, ...]
    vision_sites: tuple[tuple[int, str], ...]
    dense: Cost
    compiled: Cost
    exact: bool = True
    fired: Plan | None = None
    settings: tuple[tuple[str, Any], ...] = ()  # what was solved for: budgets to give to `--set`
    budget: str = ""  # the share that the policy was asked to work at
    operators: tuple[Operators, ...] = dataclasses.field(default=(), compare=False)
    frames: int = 1
    alone: tuple[str, ...] = ()

    @property
    def average_visual_tokens(self) -> float:
        """The mean over decoder layers of the visual tokens that run through them."""
        return sum(layer.visual for layer in self.layers) / len(self.layers)

    @property
    def ratio(self) -> dict[str, float]:
        """Compiled divided by dense, for each field of `Cost`."""
        return self.compiled.ratio(self.dense)

    @property
    def stages(self) -> tuple[PlanStage, ...]:
        """Vision blocks, then decoder layers, as runs that open at a cut."""
        cuts: dict[int, tuple[str, ...]] = {}
        for block, site in self.vision_sites:
            cuts[block] = (*cuts.get(block, ()), site)
        vision = _runs("vision", [(cuts.get(i, ()), count, 0, 0) for i, count in enumerate(self.vision_tokens)])
        layers = [(layer.sites, layer.visual, layer.text, layer.evicted) for layer in self.layers]
        return vision + _runs("language", layers)

    def to_json(self) -> dict[str, Any]:
        """Everything, derived numbers included, as JSON values."""
        values = dataclasses.asdict(self)
        for name, parts in (("layers", self.layers), ("stages", self.stages)):
            values[name] = [{**dataclasses.asdict(part), "tokens": part.tokens, "held": part.held} for part in parts]
        values["average_visual_tokens"] = self.average_visual_tokens
        values["ratio"] = self.ratio
        values["settings"] = dict(self.settings)
        values["fired"] = self.fired.to_json() if self.fired else None
        return values

    def text(self) -> str:
        """The plan as plain text: one table of stages, one of costs."""
        height, width = self.image_size
        what = f"video of {self.frames} frames," if self.frames > 1 else "image"
        image = f", {what} {height}x{width}" if height else f", {what.rstrip(',')}" if self.frames > 1 else ""
        untouched = _sum(self.visual_tokens)
        at = f" at {self.budget}" if self.budget else ""
        tokens = f"{untouched} visual + {self.text_tokens} text tokens"
        lines = [f"{self.policy}{at} on {self.model_type}: {tokens}{image}", ""]
        lines += _table(("layers", "cut", "visual", "text", "KV length"), [_stage_row(stage) for stage in self.stages])
        lines += ["", *_table(("", "dense", "compiled", "unit", "ratio"), self._cost_rows())]
        total = sum(self.visual_tokens)
        share = f" ({100 * self.average_visual_tokens / total:.1f}%)" if total else ""
        lines += ["", f"average visual tokens per decoder layer: {self.average_visual_tokens:.1f} of {total}{share}"]
        if self.settings:
            lines.append("solved: " + " ".join(f"--set {shlex.quote(setting(*given))}" for given in self.settings))
        if not self.exact:
            lines.append(
                "images of a sequence or frames of a video share one budget: their split, and later counts, depend "
                "on content"
            )
        if self.alone:
            lines.append(f"{', '.join(self.alone)}: about the frames of a video, {self._one_frame()}")
        if reading := [layer for layer in self.layers if layer.unread]:
            first, total = reading[0], reading[0].visual
            lines.append(
                f"decode steps that choose anew attend to {total - first.unread} of {total} visual tokens from layer "
                f"{first.index} on; caches hold all of them, and costs count all of them"
            )
        if self.fired:
            low = self.fired
            lines.append(
                "decided at run time: the counts above are the most; at the least "
                f"{low.average_visual_tokens:.1f} visual tokens on average, "
                f"prefill {low.ratio['prefill']:.3f} and KV cache {low.ratio['kv_bytes']:.3f} of dense"
            )
        if self.operators:
            counts = (f"{each.graph} {each.total} ({each.added} added)" for each in self.operators)
            lines.append(f"operators: {', '.join(counts)}")
        return "\n".join(line.rstrip() for line in lines)

    def _one_frame(self) -> str:
        if len(self.visual_tokens) > 1:
            return "and each image is one; with scope: sequence the images of a prompt are one video"
        return "and an image is one; plan a video with --frames N"

    def _cost_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, label, base in COSTS:
            dense = getattr(self.dense, name)
            scale, unit = scale_of(dense, base)
            figures = (format(value / scale, ",.2f") for value in (dense, getattr(self.compiled, name)))
            rows.append((label, *figures, unit, f"{self.ratio[name]:.3f}"))
        return rows


COSTS = (
    ("vision", "vision", 1000),
    ("prefill", "prefill", 1000),
    ("decode", "decode, per token", 1000),
    ("kv_bytes", "KV cache", 1024),
)


def _sum(counts: Sequence[int]) -> str:
    """`576`, `576 + 288`, or `32 x 576` of more equal ones than are read at a glance."""
    if len(counts) > 4 and len(set(counts)) == 1:
        return f"{len(counts)} x {counts[0]}"
    return " + ".join(str(count) for count in counts)


def scale_of(value: float, base: int) -> tuple[float, str]:
    """The unit in which `value` has few digits: giga for large models, mega for small ones (kibibytes for caches)."""
    if base == 1024:
        return (2.0**20, "MiB") if value >= 2**20 else (2.0**10, "KiB")
    return (1e9, "GFLOPs") if value >= 1e9 else (1e6, "MFLOPs")


def _runs(part: str, entries: Sequence[tuple[tuple[str, ...], int, int, int]]) -> tuple[PlanStage, ...]:
    """Consecutive (sites, visual, text, evicted) entries as stages: each opens at a site or at another count."""
    stages: list[PlanStage] = []
    for index, (sites, *counts) in enumerate(entries):
        last = stages[-1] if stages else None
        if last is not None and not sites and [last.visual, last.text, last.evicted] == counts:
            stages[-1] = dataclasses.replace(last, last=index)
        else:
            stages.append(PlanStage(part, sites, index, index, *counts))
    return tuple(stages)


def _stage_row(stage: PlanStage) -> tuple[str, ...]:
    name = f"{stage.part} {stage.first}" + (f"-{stage.last}" if stage.last > stage.first else "")
    sites = ", ".join(stage.sites) or "-"
    if stage.part == "vision":
        return name, sites, str(stage.visual), "", ""
    return name, sites, str(stage.visual), str(stage.text), str(stage.held)


def setting(key: str, value: Any) -> str:
    """`steps.0.select.top.keep={share: 25%, round: nearest}`: as `--set` reads it."""
    if isinstance(value, dict):
        value = "{" + ", ".join(f"{name}: {inner}" for name, inner in value.items()) + "}"
    return f"{key}={value}"


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Left-aligned names, right-aligned numbers, two blanks between columns."""
    lines = [tuple(head), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    named = 2 if "cut" in head else 1

    def cell(text: str, column: int) -> str:
        return text.ljust(widths[column]) if column < named else text.rjust(widths[column])

    return ["  ".join(cell(text, i) for i, text in enumerate(line)) for line in lines]
