"""The policy's part in the vision encoder: cuts inside it, and the taps that later components ask of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from tvc.errors import SiteError
from tvc.graphs import Block, annotate, backward_closure, clone, find_blocks, last_node
from tvc.kernels.attention import packed_mask
from tvc.kernels.op import Attention, Tap
from tvc.kernels.segments import follow, take_rows
from tvc.passes.patches import pixels_of
from tvc.passes.reduction import decide
from tvc.passes.taps import all_rows, constants
from tvc.passes.token_map import TokenMap, in_shape_of
from tvc.program import Change, Component, Layout

PLACE = "visual_place"


def tile_state(hidden: torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(segment [n, F], counts [n, 1], size [n, F]) of a tile's patch tokens: one scope, every token real."""
    batch, count = hidden.shape[0], hidden.shape[1] - prefix
    segment = torch.zeros(batch, count, dtype=torch.int64, device=hidden.device)
    return segment, torch.ones_like(segment).sum(1, keepdim=True), torch.ones_like(segment, dtype=torch.float32)


def vision_cut(step: Any, prefix: int, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The function that shortens the tokens of every tile; prefix tokens (CLS, registers) stay."""

    def cut(
        hidden: torch.Tensor, size: torch.Tensor, scores: list[Any], taps: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        segment, counts, _ = tile_state(hidden, prefix)
        feature = hidden[:, prefix:]
        decision = decide(step, feature, size, segment, counts, scores, taps, whole=True)
        # Tiles are equally long and keep equally many, so slots beyond a tile's tokens are pads, in front, in all.
        slots = decision.chosen.shape[1]
        pads = 0 if step.merge is not None else slots - torch.sym_min(slots, feature.shape[1])
        chosen = decision.chosen[:, pads:]
        kept = take_rows(feature, chosen) if decision.feature is None else decision.feature[:, pads:]
        return torch.cat([hidden[:, :prefix], kept.to(hidden.dtype)], 1), chosen, decision.size[:, pads:]

    cut.__name__ = cut.__qualname__ = name
    return cut


def size_mask(size: torch.Tensor, hidden: torch.Tensor, prefix: int, mask: torch.Tensor | None) -> torch.Tensor:
    """[n, 1, T, T] what the sizes [n, F] of a tile's patch tokens add to the logits, `mask` included."""
    sizes = torch.nn.functional.pad(size, (prefix, 0), value=1.0)
    # One row a query: ONNX Runtime's attention takes no mask that it would have to repeat.
    added = sizes.log().to(hidden.dtype)[:, None, None, :].expand(-1, -1, sizes.shape[1], -1)
    if mask is None:
        return added
    if mask.dtype == torch.bool:
        return torch.where(mask, added, torch.finfo(hidden.dtype).min)
    return mask + added


def places(hidden: torch.Tensor, prefix: int) -> torch.Tensor:
    """[n, F] row of each patch token: all there, in order."""
    rows = torch.arange(hidden.shape[1] - prefix, device=hidden.device)
    return rows.unsqueeze(0).expand(hidden.shape[0], -1).clone()


def places_after(place: torch.Tensor, chosen: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """[n, F] row of each original token among the chosen ones, -1 where it is gone."""
    rows = torch.arange(chosen.shape[1], device=chosen.device).unsqueeze(0).expand(chosen.shape[0], -1)
    absent = torch.full_like(feature[..., 0], -1, dtype=torch.int64)
    return follow(absent.scatter(1, chosen, rows), place)


def patch_columns(index: torch.Tensor, prefix: int) -> torch.Tensor:
    """[n, F, 1] where patch tokens stand among a tile's tokens."""
    return (index + prefix).unsqueeze(2)


def first_rows(query: torch.Tensor) -> torch.Tensor:
    """[n, 1] int64: the CLS token."""
    return torch.zeros(query.shape[0], 1, dtype=torch.int64, device=query.device)


def image_of_token(query: torch.Tensor, *boundaries: torch.Tensor) -> torch.Tensor:
    """[1, P] int64: images that end before each token of a packed sequence.

    Blocks may attend inside parts of an image. Where one image ends, and only there, the parts of every block end.
    """
    places = torch.arange(query.shape[2], device=query.device)
    ends = torch.ones_like(places)
    for each in boundaries:
        ends = ends * ((places[:, None] == each[None, 1:].to(torch.int64)).sum(1) > 0)
    return ends.cumsum(0)[None]


def column_rows(columns: torch.Tensor) -> torch.Tensor:
    """[n, F * g] int64: every encoder token that visual tokens are made from."""
    return columns.flatten(1)


def score_tap(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A score primitive as a function of the parts of its attention bundle: [n, F]."""

    def score(*parts: Any) -> torch.Tensor:
        return apply(attention=Attention(*parts))

    return score


def key_tap(key: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[n, F, d] keys of each visual token, averaged over heads and its encoder tokens; 0 without any."""
    batch, features, group = columns.shape
    rows = take_rows(key.float().mean(1), columns.reshape(batch, features * group))
    real = (columns >= 0).unsqueeze(3)
    return (rows.unflatten(1, (features, group)) * real).sum(2) / real.sum(2).clamp(min=1)


class VisionInsertion:
    """Works on the draft of the vision component."""

    def __init__(self, component: Component, layout: Layout):
        self.component, self.layout = component, layout
        self.graph: fx.Graph = component.draft.graph  # type: ignore[union-attr]
        self.blocks = find_blocks(self.graph)
        self.by_index = {block.index: block for block in self.blocks}
        self.changes: list[Change] = []
        self.chosen: list[tuple[int, fx.Node]] = []  # (block, chosen) of each cut
        self._columns: fx.Node | None = None
        self._packed = False  # all encoder tokens are in one row
        self._masks: dict[int, Any] = {}  # a block's mask before sizes were added to it
        component.meta = {**component.meta, "tap_widths": {}}  # of each output for another component; 0: one number

    # Cuts ---------------------------------------------------------------------------------------------------------

    def cut(self, steps: list[Any]) -> None:
        """Puts each step's reduction in the place of its marker."""
        markers = {n.args[1]: n for n in self.graph.nodes if n.target is torch.ops.tvc.cut_marker.default}
        place = size = None
        proportional = False
        for number, step in enumerate(steps):
            _check_static(step)
            marker = markers.get(number)
            if marker is None:
                raise SiteError(
                    f"nothing behind {step.at} reaches the visual features",
                    where=step.where,
                    got=step.at,
                    want="a block that the features depend on",
                    fix="choose an earlier block; tvc inspect lists them",
                    slug="unused-block",
                )
            note, prefix = f"InsertReductions: {step.where}", self.layout.prefix_tokens
            hidden, layer = marker.args[0], int(step.at.removeprefix("vision."))
            with self.graph.inserting_before(marker):
                if place is None:
                    place = self._call(places, note, hidden, prefix)
                    state = self._call(tile_state, note, hidden, prefix)
                    size = self._call(operator.getitem, note, state, 2)
                scores, taps = self._step_taps(step, layer, marker, note)
                function = vision_cut(step, prefix, f"cut_vision_{layer}")
                node = self._call(function, note, hidden, size, scores, taps)
                kept, chosen, size = (self._call(operator.getitem, note, node, i) for i in range(3))
                feature = self._call(_without_prefix, note, hidden, prefix)
                place = self._call(places_after, note, place, chosen, feature)
            marker.replace_all_uses_with(kept)
            self.graph.erase_node(marker)
            kept.meta["val"] = marker.meta["val"]
            self.chosen.append((layer, chosen))
            proportional |= step.merge is not None and step.merge.proportional
            if proportional:
                self._weigh_sizes(size, kept, layer, note)
            self.changes.append(Change("vision", node.name, f"reduction before block {step.at}", step.where))
        if place is not None:
            self._add_output(PLACE, place)

    def _weigh_sizes(self, size: fx.Node, hidden: fx.Node, layer: int, note: str) -> None:
        """In the blocks from `layer` on, a token that stands for several counts as many times in the attention."""
        for block in self.blocks:
            node = block.attention
            if block.index < layer:
                continue
            if node.target is not torch.ops.tvc.attention.default:
                raise SiteError(
                    "attention in proportion to the sizes of tokens needs an encoder whose images stay apart",
                    where=note,
                    got=f"packed attention in vision.{block.index}",
                    want="proportional: false",
                    fix="write proportional: false, or leave it out",
                    slug="packed-sizes",
                )
            own = self._masks.setdefault(block.index, node.args[3])
            with self.graph.inserting_before(node):
                mask = self._call(size_mask, note, size, hidden, self.layout.prefix_tokens, own)
            node.args = (*node.args[:3], mask, *node.args[4:])

    def _step_taps(self, step: Any, layer: int, marker: fx.Node, note: str) -> tuple[list[Any], dict[str, Any]]:
        scores = [
            {name: self._site_tap(tap, layer, marker, note) for name, tap in term.primitive.taps().items()}
            for term in step.score
        ]
        return scores, {
            group: {name: self._site_tap(tap, layer, marker, note) for name, tap in primitive.taps().items()}
            for group, primitive in step.parts().items()
        }

    def _site_tap(self, tap: Tap, site: int, marker: fx.Node, note: str) -> Any:
        prefix, hidden = self.layout.prefix_tokens, marker.args[0]
        if tap.kind == "weights":
            return constants(self.graph, tap, f"vision.{site}", hidden, note)
        if tap.kind == "feature":
            return self._call(_without_prefix, note, hidden, prefix)
        if tap.kind == "ordinal":
            return self._call(places, note, hidden, prefix)
        if tap.kind == "text":
            raise SiteError(
                "the vision encoder sees no text",
                where=note,
                got=f"{tap.kind} at vision.{site}",
                want="feature, key, attention or ordinal",
                fix="score with text at a language site",
                slug="no-text-here",
            )
        layer = int((tap.layer or "").removeprefix("vision."))
        query, key, mask, scale, softcap = self._attention(layer, note)
        if layer == site:
            ahead = backward_closure([query, key], stop=[marker])
            copies = clone([n for n in ahead if not n < marker], {marker: hidden}, note)  # type: ignore[dict-item]
            query, key = copies.get(query, query), copies.get(key, key)
        stage = sum(cut <= layer for cut, _ in self.chosen) if layer != site else len(self.chosen)
        start = hidden if stage == len(self.chosen) else self._hidden_of(stage)
        index = self._call(places, note, start, prefix)
        for _, chosen in self.chosen[stage:]:
            index = self._call(follow, note, index, chosen)
        columns = self._call(patch_columns, note, index, prefix)
        if tap.kind == "key":
            return self._call(key_tap, note, key, columns)
        self._weighed(layer, note)
        return (query, key, mask, self._rows(tap.of[0], query, columns, note), columns, scale, None, softcap)

    def _hidden_of(self, stage: int) -> fx.Node:
        """The hidden states that the cut number `stage` shortened."""
        node = self.chosen[stage][1].args[0]
        return node.args[0]  # type: ignore[union-attr, return-value]

    # Taps of other components -------------------------------------------------------------------------------------

    def add_score(self, name: str, primitive: Any, note: str) -> None:
        """The score of every visual token by this encoder's attention, as an output."""
        tap = primitive.taps()["attention"]
        self._weighed(int(tap.layer.removeprefix("vision.")), note)
        columns = self.columns(note)
        output = self._output()
        with self.graph.inserting_before(output):
            query, key, mask, scale, softcap = self._attention(int(tap.layer.removeprefix("vision.")), note)
            parts = (query, key, mask, self._rows(tap.of[0], query, columns, note), columns, scale)
            node = self._call(score_tap(primitive.apply), note, *parts, self._images(query, note), softcap)
            self._add_tap(name, self._laid(node, note), 0)

    def add_keys(self, name: str, layer: str, note: str) -> None:
        """The mean keys of every visual token in one block, as an output."""
        columns = self.columns(note)
        with self.graph.inserting_before(self._output()):
            key: Any = self._block(int(layer.removeprefix("vision."))).attention.args[1]  # type: ignore[union-attr]
            node = self._laid(self._call(key_tap, note, key, columns), note)
        self._add_tap(name, node, int(key.meta["val"].shape[-1]))

    def add_pixels(self, name: str, note: str) -> None:
        """The pixels that each visual token was made from, as an output."""
        self._add_tap(name, *pixels_of(self.graph, self.blocks, self._features(), note))

    def columns(self, note: str) -> fx.Node:
        """[n, F, g] the encoder tokens behind each visual token."""
        if self._columns is None:
            source = last_node(self.graph, self._seen(note)[-1])
            followed = TokenMap(self.graph, source, self._features(), note)
            self._columns, self._packed = followed.columns(), followed.packed
        return self._columns

    def _laid(self, node: fx.Node, note: str) -> fx.Node:
        """A value [n, F, ...] of each visual token as the family's own code takes the features."""
        return self._call(in_shape_of, note, self._features(), node, self._packed)

    def _features(self) -> fx.Node:
        return self._output().args[0][0]  # type: ignore[index, return-value]

    def _output(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op == "output")

    def _add_tap(self, name: str, node: fx.Node, width: int) -> None:
        self.component.meta["tap_widths"][name] = width
        self._add_output(name, node)

    def _add_output(self, name: str, node: fx.Node) -> None:
        output = self._output()
        output.args = ((*output.args[0], node),)  # type: ignore[misc]
        self.component.outputs = (*self.component.outputs, name)
        self.changes.append(Change("vision", node.name, f"output {name}", "another component asks for it"))

    # Shared -------------------------------------------------------------------------------------------------------

    def _seen(self, note: str) -> list[Block]:
        """The blocks, if there are any whose attention is a call that a graph shows."""
        if not self.blocks:
            raise SiteError(
                "the attention of this vision encoder cannot be seen",
                where=note,
                got="attention computed by code of the model's own (with relative positions, say)",
                want="calls of the attention function that transformers' models share",
                fix="take the score from a decoder layer: layer: previous at language.2",
                slug="unseen-attention",
            )
        return self.blocks

    def _block(self, index: int) -> Block:
        block = self.by_index.get(index)
        if block is None:
            blocks = self._seen("score, layer")
            raise SiteError(
                f"vision.{index} is not part of the way to the visual features",
                where="score, layer",
                got=f"vision.{index}",
                want=f"vision.{blocks[0].index}..vision.{blocks[-1].index}",
                fix=f"write layer: vision.{blocks[-1].index}",
                slug="unused-block",
            )
        return block

    def _attention(self, index: int, note: str) -> tuple[Any, Any, Any, float, float]:
        """(query, key, mask, scale, softcap)"""
        node = self._block(index).attention
        query, key, _, mask, scale, *softcap = node.args
        if node.target is torch.ops.tvc.attention.default:
            return query, key, mask, scale, *softcap  # type: ignore[return-value]
        return query, key, self._call(_packed, note, mask, query), scale, 0.0  # type: ignore[return-value]

    def _images(self, query: Any, note: str) -> fx.Node | None:
        """[1, P] the image of each token, where the encoder packs all of them in one sequence."""
        nodes = [block.attention for block in self.blocks if block.attention is not None]
        packed = [node.args[3] for node in nodes if node.target is torch.ops.tvc.packed_attention.default]
        return self._call(image_of_token, note, query, *dict.fromkeys(packed)) if packed else None

    def _weighed(self, layer: int, note: str) -> None:
        """Scores read the attention off q, k and what may be seen, and know nothing of sizes."""
        if layer in self._masks:
            raise SiteError(
                "a score takes the attention of a block that weighs tokens by their sizes",
                where=note,
                got=f"attention of vision.{layer}, behind a merge with proportional: true",
                want="a layer in front of the merge, or proportional: false",
                fix="write proportional: false, or score keys or features",
                slug="weighed-attention",
            )

    def _rows(self, of: str, query: Any, columns: fx.Node, note: str) -> fx.Node:
        if of == "cls":
            return self._call(first_rows, note, query)
        if of == "all":
            return self._call(all_rows, note, query)
        return self._call(column_rows, note, columns)

    def _call(self, function: Any, note: str, *arguments: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments)
        annotate(node, note)
        return node


def _packed(boundaries: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return packed_mask(boundaries, query.shape[2])


def _without_prefix(hidden: torch.Tensor, prefix: int) -> torch.Tensor:
    return hidden[:, prefix:]


def _check_static(step: Any) -> None:
    """Inside the encoder every tile keeps the same number of tokens."""
    late = [
        f"{part.kind}: {part.key}"
        for part in (step.select, step.rest, step.merge)
        if part is not None and not part.exact
    ]
    what = "an exit" if step.exit is not None else " with ".join(late)
    if what:
        raise SiteError(
            f"{what} decides at run time, and the tiles of a batch would differ in length",
            where=step.where,
            got=f"{what} at {step.at}",
            want="select: top or stride, at a vision site",
            fix="decide at a language site instead, e.g. at: language.0",
            slug="ragged-encoder",
        )
