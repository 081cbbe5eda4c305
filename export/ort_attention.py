"""Brings the attention of a traced program into the forms that ONNX Runtime runs fastest.

A traced decoder layer joins its cache, repeats the key-value heads, rotates by six elementwise ops and calls scaled dot
product attention. Two rewrites undo that before the translation:

    cat(past, new) -> expand -> attention(q, k, v, mask)   becomes  cached_attention(q, new, new, past, past, mask)
    x * cos + cat(-x[half:], x[:half]) * sin               becomes  rotary(x, cos[:half], sin[:half])

each of which is one ONNX operator (`Attention`, `RotaryEmbedding`, opset 23). They apply before and after a cut alike,
because nothing in them looks at how the mask or the positions were made. The contrib operator GroupQueryAttention was
measured against `Attention` (benchmarks/ort_attention_forms.py): on the CPU it wins 8 % of the attention time of a
640-token prefill and loses 20 to 25 % at 128 tokens and in decode steps, and it refuses a padded batch that continues a
cache with more than one token each, which `Attention` takes.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx

A = torch.ops.aten
_SAME = (A.clone.default, A.alias.default, A.detach.default, A.contiguous.default, A.lift_fresh_copy.default)
_RESHAPES = (A.view.default, A.reshape.default, A._unsafe_view.default)
_CASTS = (A._to_copy.default, A.to.dtype)
_END = 2**31 - 1


@torch.library.custom_op("tvc_export::grouped_attention", mutates_args=())
def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """softmax(softcap(q kT * scale) + mask) v: q [B, H, S, d], k and v [B, G, T, d], G divides H; softcap 0: none."""
    if softcap == 0.0:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    repeats = query.shape[1] // key.shape[1]
    logits = torch.tanh(query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * (scale / softcap)) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits.float().softmax(-1).to(value.dtype) @ value.repeat_interleave(repeats, 1)


@grouped_attention.register_fake
def _(query, key, value, mask, scale, softcap):  # type: ignore[no-untyped-def]
    return query.new_empty([*query.shape[:3], value.shape[3]])


@torch.library.custom_op("tvc_export::cached_attention", mutates_args=())
def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of q [B, H, S, d] over past [B, G, P, d] and new [B, G, S, d]: the result, all keys, all values."""
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    return grouped_attention(query, keys, values, mask, scale, softcap), keys, values


@cached_attention.register_fake
def _(query, key, value, past_key, past_value, mask, scale, softcap):  # type: ignore[no-untyped-def]
    shape = [*query.shape[:3], value.shape[3]]
    return query.new_empty(shape), torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)


@torch.library.custom_op("tvc_export::rotary", mutates_args=())
def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [B, H, S, d] by the half tables cos, sin [B, S, d/2] (the first half of x against the second)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@rotary.register_fake
def _(x, cos, sin):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _whole(node: Any) -> bool:
    """A slice that keeps everything."""
    start, stop, step = (
        (node.args[2] if len(node.args) > 2 else 0),
        (node.args[3] if len(node.args) > 3 else _END),
        (node.args[4:] or (1,))[0],
    )
    return start in (0, None) and isinstance(stop, int) and stop >= _END and step == 1


def _source(node: Any) -> Any:
    """`node` behind copies, whole slices and casts to the dtype it has."""
    while (
        _is(node, *_SAME) or (_is(node, A.slice.Tensor) and _whole(node)) or (_is(node, *_CASTS) and _same_dtype(node))
    ):
        node = node.args[0]
    return node


def _same_dtype(node: Any) -> bool:
    before = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if before is None:
        return False
    if node.target == A.to.dtype:
        return before.dtype == node.args[1]
    return set(node.kwargs) == {"dtype"} and before.dtype == node.kwargs["dtype"]


def _unrepeated(node: Any) -> Any:
    """[B, G, T, d] behind a repeat of the key-value heads to [B, H, T, d], or the node itself."""
    inner = _source(node)
    if not _is(inner, *_RESHAPES):
        return inner
    expand = _source(inner.args[0])
    unsqueeze: Any = _source(expand.args[0]) if _is(expand, A.expand.default) else None
    if not _is(unsqueeze, A.unsqueeze.default) or unsqueeze.args[1] not in (2, -3) or len(_shape(inner)) != 4:
        return inner
    states = _source(unsqueeze.args[0])
    before, after = _shape(states), _shape(inner)
    return states if len(before) == 4 and str(before[2:]) == str(after[2:]) and after[1] % before[1] == 0 else inner


def _joined(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(past, new) of a cache update along the tokens."""
    if not _is(node, A.cat.default) or len(node.args[0]) != 2 or (node.args[1:] or (0,))[0] not in (2, -2):
        return None
    past, new = node.args[0]
    return (past, new) if len(_shape(past)) == len(_shape(new)) == 4 else None


def _without_empty(graph: fx.Graph) -> int:
    """Removes the empty tensor of shape [0] that a fresh cache is joined with: in ONNX it would copy the whole past."""
    count = 0
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if not _is(node, A.cat.default):
            continue
        parts = [part for part in node.args[0] if _shape(part) != (0,)]
        if len(parts) == len(node.args[0]) or not parts:
            continue
        count += 1
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
            graph.erase_node(node)
        else:
            node.args = (parts, *node.args[1:])
    return count


def _attention_arguments(node: Any) -> tuple[Any, ...] | None:
    """(q, k, v, mask, scale, softcap) of an attention without dropout or causal flag; None for other nodes."""
    if node.op == "call_function" and str(node.target) == "tvc.attention.default":
        return tuple(node.args)
    if not _is(node, A.scaled_dot_product_attention.default):
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p", 0.0) or given.get("is_causal", False):
        return None
    if any(len(_shape(given[name])) != 4 for name in names[:3]):
        return None
    scale = given.get("scale")
    return (
        given["query"],
        given["key"],
        given["value"],
        given.get("attn_mask"),
        _shape(given["query"])[3] ** -0.5 if scale is None else scale,
        0.0,
    )


def _fuse_attention(graph: fx.Graph) -> dict[str, int]:
    cached = shared = 0
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if (found := _attention_arguments(node)) is None:
            continue
        query, key, value, mask, scale, softcap = found
        query, key, value = _source(query), _unrepeated(key), _unrepeated(value)
        keys, values = _joined(key), _joined(value)
        with graph.inserting_before(node):
            if keys is None or values is None:
                fused = graph.call_function(
                    torch.ops.tvc_export.grouped_attention.default, (query, key, value, mask, scale, softcap)
                )
                fused.meta = dict(node.meta)
                node.replace_all_uses_with(fused)
                shared += 1
                continue
            arguments = (query, keys[1], values[1], keys[0], values[0], mask, scale, softcap)
            fused = graph.call_function(torch.ops.tvc_export.cached_attention.default, arguments)
            parts = [graph.call_function(operator.getitem, (fused, i)) for i in range(3)]
        fused.meta, order[fused] = dict(node.meta), order[node]
        fused.meta["val"] = (node.meta["val"], key.meta["val"], value.meta["val"])
        for part, old in zip(parts, (node, key, value), strict=True):
            part.meta = dict(old.meta)
            # What reads the joined cache earlier than the attention runs keeps the traced join.
            later = {user for user in old.users if order.get(user, -1) > order[node] or (old is node)}
            old.replace_all_uses_with(part, delete_user_cb=lambda user, later=later: user in later)
        cached += 1
    return {"cached_attention": cached, "attention": shared}


def _halves(node: Any) -> bool:
    """Whether the last axis of `node` holds the same numbers twice, one half after the other."""
    node = _source(node)
    if getattr(node, "op", None) != "call_function":
        return False
    if node.target == A.cat.default and (node.args[1:] or (0,))[0] in (-1, len(_shape(node)) - 1):
        parts = [_source(part) for part in node.args[0]]
        half = len(parts) // 2
        return len(parts) % 2 == 0 and all(
            a is b or _shifted(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)
        )
    if node.target in (
        A.index.Tensor,
        A.gather.default,
        A.select.int,
        A.unsqueeze.default,
        A.index_select.default,
        A.slice.Tensor,
        A.expand.default,
        A.squeeze.dim,
    ):
        return _along_last(node) is False and _halves(node.args[0])
    if node.target in (A.cos.default, A.sin.default, A.neg.default, *_CASTS):
        return _halves(node.args[0])
    if node.target in (A.mul.Tensor, A.mul.Scalar, A.add.Tensor, A.where.self):
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return bool(tensors) and all(_halves(arg) or (_shape(arg) or (1,))[-1] == 1 for arg in tensors)
    return False


def _along_last(node: Any) -> bool:
    """Whether an indexing op touches the last axis of what it reads."""
    rank = len(_shape(node.args[0]))
    if node.target == A.gather.default and not _repeated_along_last(node.args[2]):
        return True
    if node.target == A.index.Tensor:
        return len(node.args[1]) == rank and node.args[1][-1] is not None
    if node.target == A.expand.default:
        return str(_shape(node)[-1]) != str(_shape(node.args[0])[-1])
    axis = node.args[1] if len(node.args) > 1 else 0
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    if node.target == A.unsqueeze.default:
        return any(a in (-1, rank) for a in axes)
    return any(a in (-1, rank - 1) for a in axes)


def _repeated_along_last(index: Any) -> bool:
    """Whether an index is the same for every number of the last axis."""
    index = _source(index)
    return _is(index, A.expand.default) and _shape(_source(index.args[0]))[-1] == 1


def _shifted(a: Any, b: Any) -> bool:
    """Whether a and b are the same rows of a doubled table's pieces, half its width apart (M-RoPE's sections)."""
    path_a, path_b = _piece(a), _piece(b)
    if path_a is None or path_b is None or path_a[0] is not path_b[0] or path_a[2:] != path_b[2:]:
        return False
    table, start = path_a[0], path_a[1]
    return path_b[1] - start == _shape(table)[-1] // 2 and _halves(table)


def _piece(node: Any) -> tuple[fx.Node, int, int, Any] | None:
    """(table, start, width, rows) when `node` is rows of a slice of a table along its last axis."""
    node, rows = _source(node), None
    if _is(node, A.select.int):
        rows, node = (node.args[1], node.args[2]), _source(node.args[0])
    if _is(node, operator.getitem) and _is(node.args[0], A.split_with_sizes.default):
        split, index = node.args
        if (split.args[2:] or (0,))[0] not in (-1, len(_shape(split.args[0])) - 1):
            return None
        return _source(split.args[0]), sum(split.args[1][:index]), split.args[1][index], rows
    if (
        _is(node, A.slice.Tensor)
        and node.args[1] in (-1, len(_shape(node)) - 1)
        and all(isinstance(a, int) for a in node.args[2:4])
    ):
        return _source(node.args[0]), node.args[2], node.args[3] - node.args[2], rows
    return None


def _rotated(node: Any) -> Any:
    """x if `node` is cat(-x[half:], x[:half]) along the last axis."""
    node = _source(node)
    if (
        not _is(node, A.cat.default)
        or len(node.args[0]) != 2
        or (node.args[1:] or (0,))[0] not in (-1, len(_shape(node)) - 1)
    ):
        return None
    negative, first = (_source(part) for part in node.args[0])
    second: Any = _source(negative.args[0]) if _is(negative, A.neg.default) else None
    if (
        not _is(first, A.slice.Tensor)
        or not _is(second, A.slice.Tensor)
        or _source(first.args[0]) is not _source(second.args[0])
    ):
        return None
    x, half = _source(first.args[0]), _shape(node)[-1] // 2
    last = (-1, len(_shape(x)) - 1)
    if (
        first.args[1] not in last
        or second.args[1] not in last
        or tuple(first.args[2:4]) != (0, half)
        or second.args[2] != half
    ):
        return None
    return x if _shape(x)[-1] == 2 * half else None


def _table(node: Any) -> Any:
    """[B, S, d] behind its unsqueeze to [B, 1, S, d]."""
    node = _source(node)
    return (
        _source(node.args[0])
        if _is(node, A.unsqueeze.default) and node.args[1] in (1, -3) and len(_shape(node)) == 4
        else None
    )


def _product(node: Any) -> tuple[Any, Any] | None:
    """(states, table) of states * table."""
    if not _is(node, A.mul.Tensor):
        return None
    for states, table in (node.args, node.args[::-1]):
        if (found := _table(table)) is not None:
            return _source(states), found
    return None


def _fuse_rotary(graph: fx.Graph) -> int:
    count = 0
    half_tables: dict[Any, fx.Node] = {}
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if (
            not _is(node, A.add.Tensor)
            or node.kwargs
            or (left := _product(node.args[0])) is None
            or (right := _product(node.args[1])) is None
        ):
            continue
        (x, cos), (turned, sin) = left, right
        if (
            _rotated(turned) is not x
            or len(_shape(x)) != 4
            or len(_shape(cos)) != 3
            or not (_halves(cos) and _halves(sin))
        ):
            continue
        if len({value.meta["val"].dtype for value in (x, cos, sin)}) != 1 or str(_shape(cos)[0]) != str(_shape(x)[0]):
            continue
        for table in (cos, sin):
            if table not in half_tables:
                half = _shape(table)[-1] // 2
                with graph.inserting_after(table):
                    half_tables[table] = graph.call_function(A.slice.Tensor, (table, 2, 0, half))
                half_tables[table].meta["val"] = table.meta["val"][..., :half]
        with graph.inserting_before(node):
            fused = graph.call_function(torch.ops.tvc_export.rotary.default, (x, half_tables[cos], half_tables[sin]))
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        count += 1
    return count


def fuse(exported: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, dict[str, int]]:
    """A copy of the program, weights shared, with attention and rotation as single nodes, and the number of each.

    Args:
        exported: A program on ATen operators; not changed.

    Returns:
        The new program and the counts `cached_attention`, `attention` (no cache joined right before it) and `rotary`.
    """
    graph = copy.deepcopy(exported.graph)
    for node in graph.nodes:
        if _is(node, A.view.default):
            node.target = A.reshape.default  # the strides that made a view possible are those of the attention replaced
    _without_empty(graph)
    counts = {"rotary": _fuse_rotary(graph)} | _fuse_attention(graph)
    graph.eliminate_dead_code()
    graph.lint()
    signature = copy.deepcopy(exported.graph_signature)
    for spec, result in zip(signature.output_specs, graph.output_node().args[0], strict=True):
        spec.arg.name = result.name
    module = fx.GraphModule(exported.graph_module, graph)
    module.meta.update(exported.graph_module.meta)
    program = torch.export.ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
    )
    return program, counts
