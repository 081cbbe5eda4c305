"""Taps: the values a policy's primitives ask for, as nodes of the decoder graph."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.fx as fx

from tvc.chunks import TAP
from tvc.errors import SiteError
from tvc.graphs import Block, annotate, backward_closure, clone, first_node, identifier
from tvc.kernels.frames import first_of
from tvc.kernels.grid import neighbours_by_columns, neighbours_by_position, row_lengths
from tvc.kernels.op import Tap
from tvc.kernels.segments import follow, ranks, take_rows
from tvc.passes.cuts import ChunkState, Cut, mask_of


def crosses(tap: Tap) -> bool:
    """Whether the tap is a value of the vision path."""
    return tap.kind == "pixel" or (tap.layer or "").startswith("vision.")


def tap_name(step: Any, group: str, name: str, kind: str = "") -> str:
    """The name under which a value of the vision path travels to the component of `step`; pixels go there once."""
    return f"{TAP}pixels" if kind == "pixel" else f"{TAP}{step.at}.{group}.{name}"


def crossing(step: Any) -> Iterator[tuple[str, Any, Tap]]:
    """(name, primitive, tap) of every value that `step`, outside the vision path, asks of it."""
    terms = step.exit.score if step.exit is not None else step.score
    for index, term in enumerate(terms):
        for tap in term.primitive.taps().values():
            if crosses(tap):
                yield tap_name(step, "score", str(index)), term.primitive, tap
    for group, primitive in step.parts().items():
        for name, tap in primitive.taps().items():
            if crosses(tap):
                yield tap_name(step, group, name, tap.kind), primitive, tap


def visual_rows(residual: torch.Tensor, visual_index: torch.Tensor) -> torch.Tensor:
    """[B, V, D] hidden states of the visual tokens."""
    return take_rows(residual, visual_index)


def text_rows(residual: torch.Tensor, text_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, D] hidden states of the text tokens and which of them are real."""
    return take_rows(residual, text_index), text_index >= 0


def running_number(segment: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    """[B, V] int64 place of each visual token among those that entered the decoder, -1 pads."""
    return torch.where(segment >= 0, origin, -1)


def token_layers(counts: list[torch.Tensor], layers: list[int]) -> torch.Tensor:
    """[B, N] int64: visual tokens of each image summed over layers, `layers` of them at a time with `counts [B, N]`."""
    total = counts[0] * layers[0]
    for count, number in zip(counts[1:], layers[1:], strict=True):
        total = total + count * number
    return total


def last_rows(query: torch.Tensor) -> torch.Tensor:
    """[B, 1] int64: the last slot, which is always real."""
    last = torch.arange(query.shape[2], device=query.device)[-1:]
    return last.unsqueeze(0).expand(query.shape[0], -1).clone()


def all_rows(query: torch.Tensor) -> torch.Tensor:
    return torch.arange(query.shape[2], device=query.device).unsqueeze(0).expand(query.shape[0], -1).clone()


def real_rows(query_positions: torch.Tensor) -> torch.Tensor:
    """[B, S] int64: every slot that is no padding, -1 for the others."""
    slots = torch.arange(query_positions.shape[1], device=query_positions.device)
    return torch.where(query_positions >= 0, slots, -1)


def behind_image(text_index: torch.Tensor, visual_index: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: the text behind the sample's last visual token; all of its text where there is none."""
    # One more column keeps the maximum defined for V = 0.
    last = torch.nn.functional.pad(visual_index, (1, 0), value=-1).amax(1, keepdim=True)
    real = text_index >= 0
    behind = real & (text_index > last)
    return behind | (real & (behind.sum(1, keepdim=True) == 0))


def text_behind(
    residual: torch.Tensor, text_index: torch.Tensor, visual_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, D] hidden states of the text tokens and which of them stand behind the last visual token."""
    return take_rows(residual, text_index), behind_image(text_index, visual_index)


def rater_mask(residual: torch.Tensor, visual_index: torch.Tensor, text_index: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: the text behind the sample's last visual token (all text where there is none) that rates."""
    asked = behind_image(text_index, visual_index)
    visual, text = take_rows(residual, visual_index), take_rows(residual, text_index)
    mask: torch.Tensor = torch.ops.tvc.text_raters(visual, visual_index >= 0, text, asked)
    return mask


def frames_of(
    position_ids: torch.Tensor, visual_index: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, V] the frame of each visual token, counted through the sample, and its place there; -1 pads.

    An image is one frame. Where positions have axes for time, rows and columns, a video's frames are told by the places
    at which a token has the row and the column of the video's first token again.
    """
    first = ranks(segment, counts) == 0
    start = first
    if position_ids.dim() == 3:
        spatial = position_ids[1:].gather(2, visual_index.clamp(min=0).expand(position_ids.shape[0] - 1, -1, -1))
        # Where each segment starts; one more column in front takes the pads.
        begin = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.int64, device=counts.device)
        slot = torch.arange(segment.shape[1], device=segment.device).expand(segment.shape)
        begin = begin.scatter_reduce(1, torch.where(first, segment + 1, 0), torch.where(first, slot, 0), "amax")
        begin = begin.gather(1, segment + 1).expand(spatial.shape)
        start = (spatial == spatial.gather(2, begin)).all(0)
    valid = segment >= 0
    number = (start & valid).long().cumsum(1)
    frame = torch.where(valid, number - 1, -1)
    # A frame's tokens stand side by side.
    place = torch.arange(segment.shape[1], device=segment.device) - first_of(frame).gather(1, frame + 1)
    return frame, torch.where(valid, place, -1)


def grid_by_position(
    position_ids: torch.Tensor, visual_index: torch.Tensor, segment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token to the right of each visual token, and the one below: each [B, V] int64 along V, -1 for none."""
    index = visual_index.clamp(min=0).expand(position_ids.shape[0], -1, -1)
    return neighbours_by_position(position_ids.gather(2, index), segment)


def rows_by_position(position_ids: torch.Tensor, visual_index: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[B, V] int64 tokens in the row of each visual token; pads 1."""
    index = visual_index.clamp(min=0).expand(position_ids.shape[0], -1, -1)
    return row_lengths(position_ids.gather(2, index), segment)


def raters_among(text_index: torch.Tensor, raters: torch.Tensor) -> torch.Tensor:
    """[B, T] int64: the slots of the text tokens that rate, -1 for the others."""
    return torch.where(raters, text_index, -1)


def transitions(
    into_attention: torch.Tensor,
    out_of_attention: torch.Tensor,
    into_mlp: torch.Tensor,
    out_of_mlp: torch.Tensor,
    visual_index: torch.Tensor,
    query_positions: torch.Tensor,
) -> torch.Tensor:
    """[B, V] float32: how much the two sub-blocks of a layer change each visual token, pads 0."""
    real = query_positions >= 0
    attention = torch.ops.tvc.transition_score(into_attention, out_of_attention, real)
    mlp = torch.ops.tvc.transition_score(into_mlp, out_of_mlp, real)
    return torch.where(visual_index < 0, 0.0, (attention + mlp).gather(1, visual_index.clamp(min=0)))


def carried(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """A number a visual token [B, V] for those that a later cut chose [B, K]; pads 0."""
    padded = torch.nn.functional.pad(values, (1, 0))
    return padded.gather(1, chosen + 1)


def columns_of(index: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, V, 1] where the chunk's slots `index` stand among the keys, whose first ones are the cache's."""
    past = key.shape[2] - query.shape[2]
    return torch.where(index >= 0, index + past, -1).unsqueeze(2)


def key_rows(key: torch.Tensor, query: torch.Tensor, index: torch.Tensor, joined: bool) -> torch.Tensor:
    """[B, V, d] keys of the chunk's slots `index`, averaged over heads; `joined`: [B, V, G d], all side by side."""
    past = key.shape[2] - query.shape[2]
    heads = key.float().transpose(1, 2)
    return take_rows(heads.flatten(2) if joined else heads.mean(2), torch.where(index >= 0, index + past, 0))


def constants(graph: fx.Graph, tap: Tap, site: str, near: Any, note: str) -> dict[str, fx.Node]:
    """The tensors of a `weights` tap as constants of the graph, on the device of the value `near`."""
    root: Any = graph.owning_module
    nodes = {}
    for name, tensor in tap.tensors().items():  # type: ignore[misc]
        attribute = identifier(f"weights.{site}.{name}")
        while hasattr(root, attribute):
            attribute += "_"
        root.register_buffer(attribute, tensor.to(near.meta["val"].device))
        nodes[name] = graph.get_attr(attribute)
        annotate(nodes[name], note)
    return nodes


class DecoderTaps:
    """Resolves taps for one step; nodes are made at the graph's current insertion point."""

    def __init__(
        self,
        graph: fx.Graph,
        blocks: list[Block],
        states: list[ChunkState],
        cuts: list[Cut],
        note: str,
        key_positions: fx.Node,
        raters: Callable[[str], fx.Node],
        transition: Callable[[int, ChunkState, str], fx.Node],
        frames: Callable[[str], fx.Node],
        position_ids: fx.Node,
    ):
        self.graph, self.blocks, self.states, self.cuts, self.note = graph, blocks, states, cuts, note
        self.key_positions, self.raters, self.transition, self.frames = key_positions, raters, transition, frames
        self.position_ids = position_ids

    def call(self, function: Any, *arguments: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments)
        annotate(node, self.note)
        return node

    def entered(self, tap: fx.Node) -> fx.Node:
        """A per-token input of the decoder, for the visual tokens that are still there."""
        return self.call(_still_there, tap, self.states[-1].origin)

    def resolve(self, tap: Tap, site: str, first: fx.Node) -> Any:
        state = self.states[-1]
        if tap.kind == "feature":
            return self.call(visual_rows, state.residual, state.visual_index)
        if tap.kind == "weights":
            return constants(self.graph, tap, site, state.residual, self.note)
        if tap.kind == "text":
            chosen = (text_behind, state.visual_index) if tap.of == ("behind",) else (text_rows,)
            pair = self.call(chosen[0], state.residual, state.text_index, *chosen[1:])
            return (self.graph.call_function(_first, (pair,)), self.graph.call_function(_second, (pair,)))
        if tap.kind == "frame":
            pair = self.frames(self.note)
            return tuple(
                self.call(running_number, state.segment, self.call(_still_there, self.call(part, pair), state.origin))
                for part in (_first, _second)
            )
        if tap.kind == "neighbour":
            return self._neighbours(tap.columns)
        if tap.kind == "row":
            return self.call(rows_by_position, state.position_ids, state.visual_index, state.segment)
        if tap.kind == "spent":
            starts = [0, *(cut.layer for cut in self.cuts), int(site.removeprefix("language."))]
            counts = [self._counts(stage) for stage in range(len(self.states))]
            layers = [end - start for start, end in itertools.pairwise(starts)]
            return counts[0], self.call(token_layers, counts, layers)
        if tap.kind == "ordinal":
            return self.call(running_number, state.segment, state.origin)
        layer = int((tap.layer or "").removeprefix("language."))
        if tap.kind == "transition":
            return self._transition(layer)
        query, key, mask, scale, softcap, stage = self._attention(layer, site, first, tap.rotary)
        index = self._slots_in(stage)
        if tap.kind == "key":
            return self.call(key_rows, key, query, index, tap.of == ("joined",))
        rows = self._rows(tap, query, stage, index)
        columns = self.call(columns_of, index, query, key)
        return (query, key, mask, rows, columns, scale, None, softcap)

    def _neighbours(self, columns: int | None) -> tuple[fx.Node, fx.Node]:
        """([B, V], [B, V]) the token to the right of each, and the one below."""
        state = self.states[-1]
        if columns is None:
            pair = self.call(grid_by_position, state.position_ids, state.visual_index, state.segment)
        else:
            pair = self.call(neighbours_by_columns, state.segment, state.counts, columns)
        return self.call(_first, pair), self.call(_second, pair)

    def _attention(self, layer: int, site: str, first: fx.Node, rotary: bool) -> tuple[Any, ...]:
        """(query, key, mask, scale, softcap, stage) of the attention in `layer`, which runs before the cut or is
        recomputed.
        """
        query, key, _, mask, scale, softcap = cast("tuple[Any, ...]", self.blocks[layer].attention.args)
        stage = sum(cut.layer <= layer for cut in self.cuts)
        if f"language.{layer}" != site:
            return query, key, mask, scale, softcap, stage
        # The block's own attention, on the tokens that have not been cut yet: its q and k are computed here as well.
        ahead = [n for n in backward_closure([query, key]) if not n < first]  # type: ignore[list-item]
        state = self.states[-1]
        known: dict[fx.Node, fx.Node] = {}
        if not rotary:
            # A token at position 0 is not turned: what the positions alone decide is worked out once more for zeros.
            residual: fx.Node = state.residual  # type: ignore[assignment]
            known = {self.position_ids: self.call(torch.zeros_like, self.position_ids), residual: residual}
            ahead = backward_closure([query, key], stop=known)  # type: ignore[list-item]
        copies = clone(ahead, known, self.note)
        mask = mask_of(mask, dataclasses.replace(state, key_positions=self.key_positions), self.note)  # type: ignore[arg-type]
        return copies.get(query, query), copies.get(key, key), mask, scale, softcap, len(self.states) - 1

    def _transition(self, layer: int) -> fx.Node:
        """[B, V] taken where the layer ended, for the visual tokens that later cuts left."""
        stage = sum(cut.layer <= layer for cut in self.cuts)
        node = self.transition(layer, self.states[stage], self.note)
        for later in self.states[stage + 1 :]:
            node = self.call(carried, node, later.chosen)
        return node

    def _counts(self, stage: int) -> fx.Node:
        """[B, N] tokens of each image in a stage, noted where it opens: behind the next cut `counts` means what is left
        there.
        """
        opens = self.cuts[stage - 1].first if stage else first_node(self.graph, self.blocks[0])
        with self.graph.inserting_before(opens):
            return self.call(torch.clone, self.states[stage].counts)

    def _slots_in(self, stage: int) -> fx.Node:
        """[B, V] where the visual tokens that are left now stood in the chunk of an earlier stage."""
        node = self.states[stage].visual_index
        for later in self.states[stage + 1 :]:
            node = self.call(follow, node, later.chosen)
        return node

    def _rows(self, tap: Tap, query: Any, stage: int, index: fx.Node) -> fx.Node:
        of = tap.of[0]
        if of == "last":
            return self.call(last_rows, query)
        if of == "text":
            return self.states[stage].text_index
        if of == "raters":
            return self.call(raters_among, self.states[stage].text_index, self.raters(self.note))
        if of == "visual":
            return index
        if of == "all":
            return self.call(real_rows, self.states[stage].query_positions)
        raise SiteError(
            f"the decoder has no {of} token",
            where=self.note,
            got=f"of: {of}",
            want="one of last, text, raters, visual, all",
            fix="take the score from a vision layer, or choose another row",
            slug="no-such-row",
        )


def _still_there(tap: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    if tap.dim() == 3:
        return take_rows(tap, origin)
    return tap.gather(1, origin.clamp(min=0))


def _first(pair: tuple[Any, Any]) -> Any:
    return pair[0]


def _second(pair: tuple[Any, Any]) -> Any:
    return pair[1]
