"""How the ops leave a graph: each becomes the aten nodes of its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tvc.kernels.op import OPS


def _sort(
    tensor: torch.Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.sort.default(tensor, dim, descending)


def lowerings() -> dict[Any, Callable[..., Any]]:
    """The table `ExportedProgram.run_decompositions` takes to replace every op by its reference."""
    return {entry.overload: entry.reference for entry in OPS.values()}


def onnx_lowerings() -> dict[Any, Callable[..., Any]]:
    """What an ONNX export takes besides, in a second `run_decompositions`: the exporter knows no stable sort.

    ONNX sorts with TopK, which by its specification puts the lower index first among equals, so the plain sort that the
    exporter does know means the same there. It does not in PyTorch: apply this table to graphs that become ONNX alone.
    """
    return {torch.ops.aten.sort.stable: _sort}
