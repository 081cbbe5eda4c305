"""The graph of a chunk without visual tokens: cuts have nothing to do there, and leave it.

A decode step runs the whole decoder for one token a sample. Scores, selections and gathers of cuts would be launches
that change nothing, as many as a cut of a prefill takes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx as fx

from tvc.graphs import join_equal

SHORTEN = torch.ops.tvc.shorten.default
# The argument that each result is where nothing is visual: caches of text and memories stay, no token comes back, and
# every new key is turned.
LEFT: dict[Any, int] = {
    torch.ops.tvc.evict.default: 0,
    torch.ops.tvc.pool_cache.default: 0,
    torch.ops.tvc.restore.default: 2,
    torch.ops.tvc.remember.default: 0,
    torch.ops.tvc.unrotated_keys.default: 0,
}
_SAME = (1, 3, 4, 5, 6, 7, 8, 9)  # the argument of `shorten` that each result but the last is, where nothing goes


def without_cuts(draft: fx.GraphModule) -> fx.GraphModule:
    """What `draft` computes of chunks without a visual token.

    Args:
        draft: a decoder. Its weights are shared, and it stays as it is; where cuts are no longer whole, it is returned.
    """
    cuts = [node for node in draft.graph.nodes if node.target is SHORTEN]
    if not cuts and all(node.target not in LEFT for node in draft.graph.nodes):
        return draft
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(draft.graph, copies))
    for cut in (copies[node] for node in cuts):
        positions = cut.args[4]
        for result in list(cut.users):
            number = cast("int", result.args[1])
            if number < len(_SAME):
                result.replace_all_uses_with(cast("fx.Node", cut.args[_SAME[number]]))
            elif result.users:
                with graph.inserting_before(result):
                    every = graph.call_function(_every_slot, (positions,))
                result.replace_all_uses_with(every)
    for node in [copies[node] for node in draft.graph.nodes if node.target in LEFT]:
        node.replace_all_uses_with(cast("fx.Node", node.args[LEFT[node.target]]))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    # Positions behind a cut are now those in front of it, and so is all that is made of them.
    join_equal(graph)
    return fx.GraphModule(draft, graph)


def _every_slot(positions: torch.Tensor) -> torch.Tensor:
    """[B, S] int64: the slots of a chunk [B, S], in order."""
    return torch.arange(positions.shape[1], device=positions.device).expand(positions.shape)
