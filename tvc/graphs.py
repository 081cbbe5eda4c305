"""Graphs in the open: drafts made from exported programs, their transformer blocks, and small surgery on them."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_flatten
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from tvc.program import Component

A = torch.ops.aten
_CHECKS = (A._assert_scalar.default, A._assert_tensor_metadata.default, A.sym_constrain_range_for_size.default)


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def open_draft(component: Component) -> fx.GraphModule:
    """The component's graph with one placeholder per input (in order) and its weights, shared, as attributes.

    Assertions of the trace are left out: the next trace makes its own.
    """
    exported = component.exported
    signature = exported.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    root, graph = torch.nn.Module(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    user_inputs = iter(component.inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                copy = graph.placeholder(identifier(next(user_inputs)))
            else:
                copy = graph.get_attr(_attach(root, exported, spec))
            copy.meta = dict(node.meta)
        elif node.op == "output":
            copy = graph.output(tuple(copies[value] for value in node.args[0]))
        elif node.target in _CHECKS:
            continue
        else:
            if node.op == "get_attr":  # the condition or the body of a loop
                root.add_module(str(node.target), getattr(exported.graph_module, str(node.target)))
            copy = graph.node_copy(node, copies.__getitem__)
        copies[node] = copy
    draft = fx.GraphModule(root, graph)
    draft.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    # Not delete_all_unused_submodules: it takes from a loop the loops inside it.
    used = {str(node.target) for node in draft.graph.nodes if node.op in ("get_attr", "call_module")}
    for name in [name for name, _ in draft.named_children() if name not in used]:
        delattr(draft, name)
    return draft


def fork(draft: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph over the same weights."""
    return fx.GraphModule(draft, copy.deepcopy(draft.graph))


def _attach(root: torch.nn.Module, exported: torch.export.ExportedProgram, spec: Any) -> str:
    name = identifier(spec.target)
    value = exported.state_dict.get(spec.target)
    if value is None:
        value = exported.constants[spec.target]
    if isinstance(value, torch.nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
    return name


def drop_checks(exported: torch.export.ExportedProgram, bounded: bool = True) -> None:
    """Removes the assertions of a trace, which take the sample for typical (no budget of 0, as in a decode step).

    With `bounded`, sizes keep the upper bounds that the trace found: an image's may be what the encoder can take.
    """
    for module in exported.graph_module.modules():  # the graph, and those of its loops
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.target in _CHECKS and not node.users:
                module.graph.erase_node(node)
        module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        module.recompile()
    # A budget of an eighth made the trace believe in eight tokens at least, or in fifteen at most where it left one of
    # the sample's; a decode step has none, and a longer prompt more.
    ranges = exported.range_constraints
    for size, known in ranges.items():
        ranges[size] = ValueRanges(min(0, known.lower), known.upper if bounded else int_oo)


def drop_unused_attributes(draft: fx.GraphModule) -> None:
    """Forgets weights that no node reads, so that no artifact stores them."""
    read = {node.target for node in draft.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*draft.named_parameters(recurse=False), *draft.named_buffers(recurse=False))]:
        if name not in read:
            delattr(draft, name)


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a graph: its number and its attention call, None where it mixes tokens in another way."""

    index: int
    attention: fx.Node | None
    prefix: str  # module path of the block list

    def holds(self, node: fx.Node) -> bool:
        own = f"{self.prefix}.{self.index}"
        return any(path == own or path.startswith(f"{own}.") for path in module_paths(node))


def module_paths(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (
        torch.ops.tvc.attention.default,
        torch.ops.tvc.packed_attention.default,
    )


def find_blocks(graph: fx.Graph) -> list[Block]:
    """The blocks of a graph, read off the module paths of its attention calls.

    Of several block lists (an encoder and a resampler, say) the longest is meant. Its blocks without attention, between
    those with, are found by their paths.
    """
    lists: dict[str, dict[int, fx.Node]] = {}
    for node in graph.nodes:
        if not is_attention(node):
            continue
        paths = module_paths(node)
        parts = paths[-1].split(".") if paths else []
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if numbers:
            lists.setdefault(".".join(parts[: numbers[-1]]), {}).setdefault(int(parts[numbers[-1]]), node)
    if not lists:
        return []
    prefix, found = max(lists.items(), key=lambda item: len(item[1]))
    numbered = re.compile(rf"{re.escape(prefix)}\.(\d+)(\.|$)")
    named = (path for node in graph.nodes for path in module_paths(node))
    others = {int(match[1]) for path in named if (match := numbered.match(path))}
    return [Block(index, found.get(index), prefix) for index in sorted(others | set(found))]


def first_node(graph: fx.Graph, block: Block) -> fx.Node:
    """The first node that belongs to the block: a cut before the block stands in front of it."""
    return next(node for node in graph.nodes if node.op == "call_function" and block.holds(node))


def last_node(graph: fx.Graph, block: Block) -> fx.Node:
    """The last node that belongs to the block: what it gives."""
    return [node for node in graph.nodes if node.op == "call_function" and block.holds(node)][-1]


def placeholders(graph: fx.Graph) -> dict[str, fx.Node]:
    return {str(node.target): node for node in graph.nodes if node.op == "placeholder"}


def backward_closure(roots: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> list[fx.Node]:
    """`roots` and everything they are computed from, in graph order; `stop` nodes are not entered nor listed."""
    stop = set(stop)
    seen: set[fx.Node] = set()
    stack = [node for node in roots if node not in stop]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += [n for n in node.all_input_nodes if n not in seen and n not in stop]
    graph = next(iter(seen)).graph if seen else None
    return [node for node in graph.nodes if node in seen] if graph is not None else []


def clone(nodes: Iterable[fx.Node], substitutes: dict[fx.Node, fx.Node], note: str) -> dict[fx.Node, fx.Node]:
    """Copies `nodes` (in order) at the graph's insertion point, reading `substitutes` where they name an input."""
    copies = dict(substitutes)
    for node in nodes:
        if node in copies or node.op in ("placeholder", "get_attr"):
            continue
        copy = node.graph.node_copy(node, lambda n: copies.get(n, n))
        annotate(copy, note)
        copies[node] = copy
    return copies


def join_equal(graph: fx.Graph) -> None:
    """Nodes that compute the same become one.

    PyTorch's own passes take 1 and 1.0 for the same argument, and with them results of two types. A graph that writes
    into a tensor is left alone: what is read before and after is not the same.
    """
    if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in graph.nodes):
        return
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags:
            continue
        leaves, structure = tree_flatten((node.args, node.kwargs))
        told = tuple(leaf if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf)) for leaf in leaves)
        first = seen.setdefault((node.target, told, str(structure)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def operators(graph: fx.Graph) -> tuple[int, int]:
    """How many nodes compute a tensor, views left out, and how many of them a pass added."""
    working = [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
        and not getattr(node.target, "is_view", False)
        and not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
    ]
    return len(working), sum("tvc" in (node.meta.get("custom") or {}) for node in working)


def annotate(node: fx.Node, note: str) -> None:
    """Remembers which pass added the node, through the traces to come."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), "tvc": note}
