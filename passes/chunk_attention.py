"""ChunkAttention: while a prompt is read, a visual token sees no frame of more than a few chunks before its own.

The chunk of every slot is found once, where the prompt enters the decoder, and goes into each of its masks. Masks that
are made anew behind a cut take along what is left of it.
"""

from __future__ import annotations

import torch

from tvc.graphs import annotate, open_draft, placeholders
from tvc.passes.base import Pass
from tvc.passes.taps import frames_of
from tvc.policy.options import Chunks
from tvc.program import Change, Program

MASK = torch.ops.tvc.attention_mask.default


class ChunkAttention(Pass):
    """Makes the decoder's masks those of chunks of frames."""

    gives = frozenset({"chunked"})

    def __init__(self, rule: Chunks):
        self.rule = rule

    def run(self, program: Program) -> list[Change]:
        decoder = program.components["decoder"]
        decoder.draft = open_draft(decoder)
        graph = decoder.draft.graph
        masks = [node for node in graph.nodes if node.target is MASK]
        named = placeholders(graph)
        inputs = [named[name] for name in ("position_ids", "visual_index", "visual_segment", "visual_counts")]
        with graph.inserting_before(masks[0]):
            frames = graph.call_function(frames_of, tuple(inputs))
            arguments = (frames, named["visual_index"], named["query_positions"], self.rule.frames)
            chunks = graph.call_function(chunk_of_slots, arguments)
        for node in (frames, chunks):
            annotate(node, "ChunkAttention")
        decoder.meta = {**decoder.meta, "chunks": chunks}
        changes = []
        for mask in masks:
            spans = mask.args[3] if len(mask.args) > 3 else None
            mask.args = (*mask.args[:3], spans, chunks, self.rule.previous)
            what = f"chunks of {self.rule.frames} frames see {self.rule.previous} before them"
            changes.append(Change("decoder", mask.name, what, "attention"))
        return changes


def chunk_of_slots(
    frames: tuple[torch.Tensor, torch.Tensor], visual_index: torch.Tensor, query_positions: torch.Tensor, size: int
) -> torch.Tensor:
    """[B, S] int64: the chunk of `size` frames that each slot of the chunk at hand is of; -1 for text and pads.

    Args:
        frames: frame and place of every visual token, see `frames_of`.
        visual_index: [B, V] int64 its slot, -1 pads.
        query_positions: [B, S], of which the shape alone is read.
    """
    frame = frames[0]
    # Column 0 takes the pads.
    made = torch.nn.functional.pad(torch.full_like(query_positions, -1), (1, 0), value=-1)
    return made.scatter(1, visual_index + 1, torch.where(frame < 0, -1, frame // size))[:, 1:].clone()
