"""FuseAttention: attention that is masked by positions alone becomes an op that never holds the mask.

A mask of queries x keys costs more memory than the keys, and keeps PyTorch from its fastest kernels. Two rules:

- `attention` over a mask of positions becomes `attend`;
- `attention_score` of some rows becomes `attend_score`, which asks for no more than those rows may see.

Where a rule does not fit, the evidence says why, and the nodes stay as they are.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.fx as fx

from tvc.graphs import annotate, open_draft
from tvc.passes.base import Pass
from tvc.program import Change, Component, Program

OP = torch.ops.tvc


class FuseAttention(Pass):
    """Rewrites the decoder's attention for a device that has kernels for `attend`."""

    needs = frozenset({"retraced"})
    may_be_idle = True  # a decoder whose every layer has a window, say

    def run(self, program: Program) -> list[Change]:
        decoder = program.components["decoder"]
        decoder.draft = open_draft(decoder)
        changes, runs = [], dict[fx.Node, fx.Node]()
        for node in list(decoder.draft.graph.nodes):
            if node.target is OP.attention.default:
                why = _unfit(node.args[3], softcap=node.args[5])
                if not why:
                    _attend(decoder.draft.graph, node, runs)
                changes.append(_evidence(decoder, node, "attends by positions", why))
            elif node.target is OP.attention_score.default:
                why = _unfit(node.args[2]) or _whole(node)
                if not why:
                    _narrow(node)
                changes.append(_evidence(decoder, node, "scores by positions", why))
        return changes


def _unfit(mask: object, softcap: object = 0.0) -> str:
    """Why a node cannot go without its mask; empty where it can."""
    if not isinstance(mask, fx.Node) or mask.target is not OP.attention_mask.default:
        return "its mask is not made of positions alone"
    window, spans = mask.args[2], mask.args[3] if len(mask.args) > 3 else None
    if window:
        return f"its window of {window} tokens counts dropped tokens too"
    if spans is not None:
        return "tokens of a span attend in both directions"
    if len(mask.args) > 4 and mask.args[4] is not None:
        return "visual tokens see those of some chunks alone"
    return f"its logits have a soft cap of {softcap}" if softcap else ""


def _whole(node: fx.Node) -> str:
    """Why a score keeps the whole mask: its rows are all there are."""
    query, rows = node.args[0].meta["val"], node.args[3].meta["val"]
    return "every row scores" if str(query.shape[2]) == str(rows.shape[1]) else ""


def _evidence(component: Component, node: fx.Node, what: str, why: str) -> Change:
    return Change(component.name, node.name, "left as it is" if why else what, why or "masked by positions alone")


def _attend(graph: fx.Graph, node: fx.Node, runs: dict[fx.Node, fx.Node]) -> None:
    query, key, value, mask, scale, _ = cast("tuple[fx.Node, ...]", node.args)
    queries, keys = cast("tuple[fx.Node, ...]", mask.args[:2])
    if keys not in runs:
        with graph.inserting_before(mask):
            runs[keys] = graph.call_function(OP.attention_runs.default, (keys,))
        annotate(runs[keys], "runs of pads and tokens")
    node.target, node.args = OP.attend.default, (query, key, value, queries, keys, runs[keys], scale)


def _narrow(node: fx.Node) -> None:
    query, key, mask, rows, columns, *rest = cast("tuple[fx.Node, ...]", node.args)  # scale, heads, softcap
    queries, keys = cast("tuple[fx.Node, ...]", mask.args[:2])
    node.target, node.args = OP.attend_score.default, (query, key, queries, keys, rows, columns, *rest)
