"""One file for the weights of all graphs of an artifact, each tensor once, streamed to disk and memory-mapped back.

A tensor that several graphs (or several names of one graph) hold is recognised by its memory, and tensors of equal
content by a digest; graphs then point to the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch

FILE = "model.onnx_data"
_INLINE = 1024  # bytes: shape inference needs small constants inside the graph
_PAGE, _WORD = 4096, 64  # large tensors start on a page, for memory mapping


def _identity(tensor: ir.TensorProtocol) -> tuple[Any, ...] | None:
    """What tells that two tensors are the same memory; None where that cannot be told."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.data_ptr(), tuple(raw.shape), tuple(raw.stride()), raw.dtype
    return None


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    """The little-endian content, without a copy where the tensor is contiguous on the CPU."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        plain = raw.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return memoryview(plain.numpy())  # type: ignore[arg-type]
    return memoryview(np.ascontiguousarray(np.frombuffer(tensor.tobytes(), np.uint8)))  # type: ignore[arg-type]


class _File:
    """The data file while it is written: where each content went."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.by_identity: dict[Any, tuple[int, int]] = {}
        self.by_content: dict[Any, tuple[int, int]] = {}

    def place(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        """(offset, length) of the tensor's bytes, written now if they were not yet."""
        identity = _identity(tensor)
        if identity is not None and identity in self.by_identity:
            return self.by_identity[identity]
        content = _bytes(tensor)
        digest = hashlib.sha256(content).digest()
        if digest not in self.by_content:
            self.stream.write(b"\0" * (-self.stream.tell() % (_PAGE if len(content) >= 16 * _PAGE else _WORD)))
            self.by_content[digest] = self.stream.tell(), len(content)
            self.stream.write(content)
        found = self.by_content[digest]
        if identity is not None:
            self.by_identity[identity] = found
        return found


def save(models: Mapping[str, ir.Model], folder: Path) -> list[Path]:
    """Writes `<name>.onnx` for every model and their weights into one `model.onnx_data`; returns the files.

    The models are changed: their large initializers point into the file afterwards.
    """
    with (folder / FILE).open("wb") as stream:
        file = _File(stream)
        for model in models.values():
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _INLINE:
                    continue
                offset, length = file.place(tensor)
                value.const_value = ir.ExternalTensor(
                    FILE, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=folder
                )
    files = [folder / FILE]
    for name, model in models.items():
        files.append(folder / f"{name}.onnx")
        ir.save(model, files[-1])
    return files
