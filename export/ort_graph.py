"""Rewrites of an exported ONNX graph: linear layers that keep the weight as stored, joined add-and-norm, named sizes.

The linear layers matter for more than speed: torch stores a weight as [out, in], ONNX's MatMul wants [in, out], and
the exporter would fold the transposition into a second copy, so that a tied embedding and output head were two
tensors on disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

_SYMBOL = re.compile(r"\b[su]\d+\b")


def forget_origin(model: ir.Model) -> None:
    """Removes what the exporter notes on every node: stack traces, which name files of the machine that compiled."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def keep_weight_layout(model: ir.Model) -> int:
    """MatMul(x, Transpose(weight)) becomes FusedMatMul(x, weight, transB=1). Run before any folding.

    Returns:
        How many did.
    """
    count = 0
    for node in list(model.graph):
        transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        if weight is None or not weight.is_initializer() or _rank(weight) != 2:
            continue
        fused = ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain="com.microsoft", name=node.name)
        node.outputs[0].dtype = node.outputs[0].dtype or weight.dtype  # not yet inferred inside a linear layer
        _replace(model.graph, node, node, fused, 0)
        count += 1
    passes.RemoveUnusedNodesPass()(model)
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def _replace(graph: ir.Graph, place: ir.Node, old: ir.Node, new: ir.Node, output: int) -> None:
    """`new`, inserted before `place`, gives what the first output of `old` gave, under its name."""
    before, after = old.outputs[0], new.outputs[output]
    after.shape, after.dtype, name = before.shape, before.dtype, before.name
    graph.insert_before(place, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name


def join_residual_norms(model: ir.Model) -> int:
    """RMSNormalization(a + b) becomes SkipSimplifiedLayerNormalization(a, b), which gives the sum as well.

    Returns:
        How many did.
    """
    count = 0
    for norm in list(model.graph):
        if norm.op_type != "RMSNormalization" or norm.attributes.get_int("axis", -1) not in (-1, 2):
            continue
        total, scale = norm.inputs[:2]
        add = total.producer() if total is not None else None
        if add is None or add.op_type != "Add" or scale is None or not scale.is_initializer() or _rank(scale) != 1:
            continue
        a, b = add.inputs
        if a is None or b is None or _rank(a) != 3 or str(a.shape) != str(b.shape) or total.dtype != scale.dtype:
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        joined = ir.node(
            "SkipSimplifiedLayerNormalization",
            [a, b, scale],
            {"epsilon": epsilon},
            domain="com.microsoft",
            num_outputs=4,
            name=norm.name,
        )
        _replace(model.graph, add, norm, joined, 0)
        summed, name = joined.outputs[3], total.name
        summed.shape, summed.dtype = total.shape, total.dtype
        total.replace_all_uses_with(summed, replace_graph_outputs=True)
        model.graph.remove(add, safe=True)
        summed.name = name
        count += 1
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def widen_rotation_tables(model: ir.Model) -> None:
    """Rotations by tables of one row get that row once a sample: the optimizer that makes such nodes forgets to.

    Tables of that optimizer may be of unknown shape.
    """
    for rotation in [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        x = rotation.inputs[0]
        for place, table in enumerate(rotation.inputs[1:3], 1):
            if x is None or table is None or (table.shape is not None and table.shape[0] != 1):
                continue
            axis = ir.node("Constant", [], {"value_ints": [1, 1]})
            batch = ir.node("Shape", [x], {"start": 0, "end": 1})
            shape = ir.node("Concat", [batch.outputs[0], axis.outputs[0]], {"axis": 0})
            wide = ir.node("Expand", [table, shape.outputs[0]])
            wide.outputs[0].dtype = x.dtype
            model.graph.insert_before(rotation, [axis, batch, shape, wide])
            rotation.replace_input_with(place, wide.outputs[0])


def name_sizes(model: ir.Model, sizes: Mapping[str, Mapping[int, str]]) -> None:
    """Gives the symbolic sizes of a graph names that mean something.

    Args:
        model: Changed in place.
        sizes: For each input the name of each of its dynamic axes; the first name given to a symbol holds.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, sizes.get(value.name or "", {}).get(axis, f"{value.name}_{axis}"))
    values = set(model.graph.inputs)
    for node in model.graph.all_nodes():
        values.update(node.outputs)
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return _SYMBOL.sub(lambda match: names.get(match.group(), match.group()), size.value)
