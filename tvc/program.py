"""The values that flow through the pipeline: layout, sites, component graphs and what each pass changed.

Symbols used everywhere: B batch, S slots of the current chunk, V visual tokens of the chunk, T text tokens of the
chunk, N images of the chunk, K kept, H heads, D width, P cached (past) tokens of a stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where a graph can be cut: `vision.K`, `projector` or `language.K` (before block K runs, 0-based)."""

    name: str
    legal: bool
    reason: str = ""  # why a cut here has no meaning; empty when legal


@dataclasses.dataclass(frozen=True)
class Layer:
    """The cost-relevant shape of one transformer block, read off its modules (no weights needed)."""

    linear: int  # weights of all matrix products that act on each token; FLOPs per token = 2 * linear
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0  # 0: attends to everything; else the number of tokens that one token attends to at most
    crosses: bool = False  # attends to visual tokens that are not in the decoder's sequence, and to nothing else


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is known of a model from its configuration and one sample input, without weights."""

    model_type: str
    hidden_size: int
    vocabulary: int
    language: tuple[Layer, ...]
    vision: tuple[Layer, ...]
    prefix_tokens: int  # tokens of a tile that are never visual features (CLS, registers)
    group: int  # vision-encoder tokens that make one visual token (4 for a 2x2 merger)
    tiles: int  # tiles the sample images were cut into
    tile_tokens: int  # vision-encoder tokens per tile, prefix included (all tokens for packed encoders)
    visual_tokens: tuple[int, ...]  # visual tokens of each sample image, as the decoder sees them
    patch_linear: int  # weights of the patch embedding, per tile token
    projector_linear: int  # weights of everything between the last encoder block and the decoder, per visual token
    head_linear: int  # weights of the output head
    element_size: int  # bytes of one cached number
    sites: tuple[Site, ...]
    used_vision_blocks: int | None = None  # encoder blocks that the features depend on; None: all of them
    image_size: tuple[int, int] = (0, 0)  # (height, width) of the sample image
    untraced: str = ""  # why the vision path is the model's own code and no graph; empty where it is a graph
    resampled: str = ""  # what makes every visual token of all of the encoder's; empty where it stands for some of them
    vision_width: int | None = None  # width of the encoder's hidden states; None: not known
    whole_positions: str = ""  # why the decoder takes no fractions of a position; empty where it does
    kept_positions: str = ""  # why tokens behind a cut of the decoder keep their positions; empty where they need not
    unturned: str = ""  # why positions do not turn queries and keys of each layer; empty where they do
    spatial: bool = False  # the decoder's positions tell the row and the column of a visual token
    serial: bool = False  # a video's tokens are one run in which the decoder's positions tell frames
    fixed_frequencies: str = ""  # why the decoder's rotary embedding keeps its frequencies; empty where it need not
    in_order: bool = True  # features leave the encoder tile by tile, row by row; False: packed, or stitched together
    frames: int = 1  # equal frames that each sample image has: more than one in a video

    def site(self, name: str) -> Site | None:
        return next((s for s in self.sites if s.name == name), None)

    @property
    def frame_tokens(self) -> list[list[int]]:
        """Visual tokens of each frame of each sample image."""
        return [spread(count, [1] * self.frames) for count in self.visual_tokens]

    @property
    def apart(self) -> str:
        """Why nothing that the encoder says of a token is known of a visual token; empty where it is."""
        return self.untraced or self.resampled

    def columns(self, component: str) -> int | None:
        """How many tokens make one row of a tile's grid, as seen in `component`; None where that is not known.

        Tiles are taken to be square. A grid is known where every visual token stands in one of equal tiles, in order.
        """
        tokens = self.tile_tokens - self.prefix_tokens
        whole = self.in_order and sum(self.visual_tokens) * self.group == self.tiles * tokens
        count = tokens if component == "vision" else tokens // self.group
        side = math.isqrt(max(count, 0))
        return side if whole and side and side * side == count else None


def spread(total: int, shares: Sequence[int]) -> list[int]:
    """A whole number divided in proportion to the shares, nothing where they are nothing."""
    whole, running, given = sum(shares), 0, 0
    parts = []
    for share in shares:
        running += share
        upto = total * running // whole if whole else 0
        parts.append(upto - given)
        given = upto
    return parts


@dataclasses.dataclass(frozen=True)
class Change:
    """One piece of evidence: which node a pass added or rewired, what it did and why."""

    component: str
    node: str
    what: str
    why: str


@dataclasses.dataclass
class Stage:
    """Decoder layers that share one sequence length, one past length and one `key_positions`.

    Those between two cuts, or a part of them where a later cut takes what it drops out of the caches of some alone.
    Layers behind some that tokens pass by go on with the stage in front of these: it comes again, under its index.
    """

    index: int
    layers: range
    site: str | None  # the cut that opens the stage; None where none does


@dataclasses.dataclass
class Component:
    """One traced graph with named inputs and outputs.

    `exported` runs on flat tensors in the order of `inputs` and returns a tuple in the order of `outputs`.
    `sample` holds tensors of the shapes it was traced with; `dynamic` says which axes may vary. Between the passes that
    rewrite it, `draft` holds the graph in the open: one placeholder per input, weights as attributes, sizes of the last
    trace on the nodes (stale, yet telling which axes are token axes).
    """

    name: str
    exported: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sample: tuple[torch.Tensor, ...]
    dynamic: tuple[Mapping[int, Any], ...]
    draft: torch.fx.GraphModule | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.draft.graph if self.draft is not None else self.exported.graph


@dataclasses.dataclass
class Program:
    """The traced components (`vision`, `projector`, `embed`, `decoder`), the layout and the history of the passes."""

    layout: Layout
    components: dict[str, Component]
    stages: list[Stage] = dataclasses.field(default_factory=list)
    facts: frozenset[str] = frozenset()
    history: list[tuple[str, tuple[Change, ...]]] = dataclasses.field(default_factory=list)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.layout.sites

    def text(self, component: str | None = None) -> str:
        """The graphs as Python, each added node followed by the pass and the policy step that added it."""
        blocks = []
        for name, part in self.components.items():
            if component not in (None, name):
                continue
            blocks.append(f"# component {name}: {', '.join(part.inputs)} -> {', '.join(part.outputs)}")
            for node in part.graph.nodes:
                note = (node.meta.get("custom") or {}).get("tvc")
                blocks.append(node.format_node() + (f"  # added by {note}" if note else ""))
        return "\n".join(str(line) for line in blocks)
