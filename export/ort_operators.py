"""How operators that `torch.onnx` lacks, or writes less well, become ONNX: the table for `custom_translation_table`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20, opset23
from onnxscript.function_libs.torch_lib.ops.core import aten_arange_start_step, aten_mul_scalar

import tvc.export.ort_attention  # noqa: F401  registers the fused operators


def _mask_like(mask: Any, query: Any) -> Any:
    """A float mask in the type of the query; a boolean one as it is."""
    return mask if mask is None or mask.dtype == 9 else opset23.CastLike(mask, query)


def _cached_attention(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, mask: Any, scale: float, softcap: float
) -> Any:
    output, present_key, present_value, _ = opset23.Attention(
        query, key, value, _mask_like(mask, query), past_key, past_value, scale=scale, softcap=softcap
    )
    return output, present_key, present_value


def _grouped_attention(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float) -> Any:
    output, _, _, _ = opset23.Attention(query, key, value, _mask_like(mask, query), scale=scale, softcap=softcap)
    return output


def _rotary(x: Any, cos: Any, sin: Any) -> Any:
    return opset23.RotaryEmbedding(x, cos, sin)


def _stable_sort(tensor: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK of everything: by its specification equal values keep the order of their indices."""
    one = opset20.Constant(value_ints=[1])
    size = opset20.Reshape(opset20.Gather(opset20.Shape(tensor), opset20.Constant(value_ints=[dim])), one)
    return opset20.TopK(tensor, size, axis=dim, largest=int(descending), sorted=1)


def _float_range(start: Any, end: Any, step: Any = 1.0, dtype: int = -1, **unused: Any) -> Any:
    """A range of fractions, counted as PyTorch counts it, in double precision.

    ONNX computes the count in single precision and may come to another one: 1/6 to 1 by 1/6 has six numbers or five.
    """
    if all(isinstance(value, (int, float)) for value in (start, end, step)) and isinstance(step, float):
        values = opset20.Constant(value_floats=torch.arange(start, end, step).tolist())
        return values if dtype in (-1, 1) else opset20.Cast(values, to=dtype)
    return aten_arange_start_step(start, end, step, dtype=dtype)


def _times_number(tensor: Any, factor: Any) -> Any:
    """A product with one number: a constant, or one that is computed from sizes and so a value of the graph."""
    if isinstance(factor, (bool, int, float)):
        return aten_mul_scalar(tensor, factor)
    return opset20.Mul(tensor, opset20.CastLike(factor, tensor))


def _contiguous_stride(tensor: Any, dim: int) -> Any:
    """ONNX has no strides; inside a loop a trace writes down those of a contiguous tensor, and reads none of them."""
    one = opset20.Constant(value_ints=[1])
    behind = opset20.Shape(tensor, start=dim + 1)
    return opset20.Squeeze(opset20.ReduceProd(opset20.Concat(behind, one, axis=0), keepdims=1))


def translations() -> dict[Any, Callable[..., Any]]:
    """The table, with that of `transformers` below it."""
    from tvc.trace.exporters import onnx_translation_table

    return {
        **onnx_translation_table(),
        torch.ops.tvc_export.cached_attention.default: _cached_attention,
        torch.ops.tvc_export.grouped_attention.default: _grouped_attention,
        torch.ops.tvc_export.rotary.default: _rotary,
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.aten.arange.start_step: _float_range,
        torch.ops.aten.sym_stride.int: _contiguous_stride,
        torch.ops.aten.mul.Scalar: _times_number,
    }
