"""The two sub-blocks of a decoder layer in its graph: what enters attention and MLP, and what comes out of them."""

from __future__ import annotations

import torch
import torch.fx as fx

from tvc.errors import SiteError
from tvc.graphs import Block, module_paths

A = torch.ops.aten
_PRODUCTS = (A.linear.default, A.mm.default, A.addmm.default, A.matmul.default, A.bmm.default)


def branches(graph: fx.Graph, block: Block, width: int, where: str) -> list[fx.Node]:
    """(into attention, out of it, into the MLP, out of it), each [B, S, width].

    Raises:
        SiteError: the layer is not made of one attention and one MLP, each a module with one input and one output.
    """
    children: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if "tvc" not in (node.meta.get("custom") or {}):  # copies that a step made for its own taps
            children[node] = _child(node, f"{block.prefix}.{block.index}.")
    if block.attention is None:
        raise _unlike(block, where, "no attention")
    attention = children[block.attention]
    others = {child for node, child in children.items() if node.target in _PRODUCTS} - {attention, ""}
    if len(others) != 1:
        raise _unlike(block, where, f"products in {', '.join(sorted(others)) or 'no module'} beside {attention}")
    ends: list[fx.Node] = []
    for child in (attention, *others):
        own = [node for node, name in children.items() if name == child]
        inside = set(own)
        entering = {n for node in own for n in node.all_input_nodes if n not in inside and _wide(n, width)}
        leaving = {n for n in own if _wide(n, width) and any(children.get(u, child) != child for u in n.users)}
        if len(entering) != 1 or len(leaving) != 1:
            raise _unlike(block, where, f"{len(entering)} values into {child}, {len(leaving)} out of it")
        ends += [*entering, *leaving]
    return ends


def _child(node: fx.Node, prefix: str) -> str:
    """The name of the layer's own module that the node belongs to."""
    inside = [path.removeprefix(prefix) for path in module_paths(node) if path.startswith(prefix)]
    return inside[0].split(".")[0] if inside else ""


def _wide(node: fx.Node, width: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 3 and str(value.shape[2]) == str(width)


def _unlike(block: Block, where: str, got: str) -> SiteError:
    return SiteError(
        f"language.{block.index} has no attention and MLP whose effect on a token can be told apart",
        where=where,
        got=got,
        want="one attention and one MLP, each with one input and one output of the decoder's width",
        fix="score by attention: {attention: {of: text, layer: previous}}",
        slug="no-branches",
    )
