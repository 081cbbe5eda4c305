"""All ops in one graph: exported once, then run in ONNX Runtime and TorchScript at sizes it was not traced with."""

from __future__ import annotations

import pathlib
from typing import Any

import onnxruntime
import pytest
import torch
from kernel_one_graph import Inputs, MoreGraph, OneGraph, make, names
from kernel_one_graph_settings import SettingsGraph
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tvc.export.ort_operators import translations
from tvc.export.torchscript import plain_module
from tvc.kernels import OPS, blocks
from tvc.kernels.tolerances import TOLERANCES
from tvc.program import Component

LOWERINGS = {entry.overload.overloadpacket: entry.lowering for entry in OPS.values()}
AUTO = torch.export.Dim.AUTO
STATIC = {"feature": {2}, "metric": {2}, "text": {2}, "columns": {2}, "pairs": {2}, "vectors": {0, 1, 3}}
STATIC |= {name: {1, 3} for name in ("query", "key", "value")}

TRACED = make([[5, 4], [7]], [4, 2], past=3)
SIZES = {
    "traced": TRACED,
    "ragged-batch-of-3": make([[6, 3, 8], [2], []], [3, 5, 6], seed=1),
    "batch-of-1": make([[9]], [1], past=2, seed=2),
    "one-visual-token": make([[1]], [2], past=1, seed=3),
    "decode-step": make([[], [], []], [1, 1, 1], past=7, seed=4),
    "images-that-left-earlier": make([[0, 0], [0]], [2, 1], past=4, seed=6),
    "text-only": make([[]], [4], seed=5),
}


def trace(module: torch.nn.Module) -> torch.export.ExportedProgram:
    """Exports with every axis free that no weight fixes."""
    dynamic = tuple(
        {axis: AUTO for axis in range(value.dim()) if axis not in STATIC.get(name, set())}
        for name, value in zip(names(), TRACED.tensors(), strict=True)
    )
    return torch.export.export(
        module,
        TRACED.tensors(),
        dynamic_shapes=(dynamic,),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


@pytest.fixture(
    scope="module",
    params=[OneGraph, *(pytest.param(graph, marks=pytest.mark.conformance) for graph in (MoreGraph, SettingsGraph))],
)
def graph(request: Any) -> type[OneGraph]:
    made: type[OneGraph] = request.param
    return made


@pytest.fixture(scope="module")
def exported(graph: type[OneGraph]) -> torch.export.ExportedProgram:
    return trace(graph())


class Lowered(TorchFunctionMode):
    """Ops become what they are lowered to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return LOWERINGS.get(getattr(func, "overloadpacket", func), func)(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def lowered(graph: type[OneGraph]) -> torch.export.ExportedProgram:
    """Traced through what the ops become in aten, with blocks of rows so small that a matrix has several."""
    with pytest.MonkeyPatch.context() as patch, Lowered():
        patch.setattr(blocks, "BLOCK", 4)
        return trace(graph())


@pytest.fixture(scope="module")
def session(lowered: torch.export.ExportedProgram, tmp_path_factory: Any) -> onnxruntime.InferenceSession:
    path = tmp_path_factory.mktemp("onnx") / "ops.onnx"
    # The optimizer only costs time here; the runtime has its own.
    written = torch.onnx.export(
        lowered,
        TRACED.tensors(),
        dynamo=True,
        verbose=False,
        optimize=False,
        custom_translation_table=translations(),
    )
    written.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def scripted(
    graph: type[OneGraph], lowered: torch.export.ExportedProgram, tmp_path_factory: Any
) -> torch.jit.ScriptModule:
    path = pathlib.Path(tmp_path_factory.mktemp("script")) / "ops.pt"
    results = tuple(graph.labels)
    part = Component("ops", lowered, tuple(names()), results, TRACED.tensors(), ({},) * len(names()))
    torch.jit.script(plain_module(part)).save(path)
    return torch.jit.load(path)


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    bar = TOLERANCES[torch.float32]
    assert {name: value.shape for name, value in got.items()} == {name: value.shape for name, value in want.items()}
    for name, value in want.items():
        rtol, atol = (bar.rtol, bar.atol) if value.is_floating_point() else (0, 0)
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def eager(graph: type[OneGraph], inputs: Inputs) -> dict[str, torch.Tensor]:
    module = graph()
    values = module(*inputs.tensors())
    return dict(zip(module.labels, values, strict=True))


class Called(TorchDispatchMode):
    """Notes the ops of `tvc` that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops |= {func} if func.namespace == "tvc" else set()
        return func(*args, **(kwargs or {}))


def called(graph: type[OneGraph]) -> set[Any]:
    with Called() as mode:
        eager(graph, TRACED)
    return mode.ops


def test_every_op_is_in_one_of_the_graphs() -> None:
    assert called(OneGraph) | called(MoreGraph) | called(SettingsGraph) == {entry.overload for entry in OPS.values()}


@pytest.mark.conformance  # compiled models show it too, op by op
def test_every_op_is_one_node_of_the_traced_graph(
    graph: type[OneGraph], exported: torch.export.ExportedProgram
) -> None:
    assert called(graph) <= {node.target for node in exported.graph.nodes}


def test_lowering_leaves_no_op_behind(lowered: torch.export.ExportedProgram) -> None:
    assert not [node for node in lowered.graph.nodes if str(node.target).startswith("tvc")]


@pytest.mark.parametrize("size", SIZES)
def test_onnx_runtime_equals_eager(graph: type[OneGraph], session: onnxruntime.InferenceSession, size: str) -> None:
    want = eager(graph, SIZES[size])
    feeds = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), SIZES[size].tensors(), strict=True)}
    got = session.run(None, feeds)
    compare({name: torch.from_numpy(value) for name, value in zip(want, got, strict=True)}, want)


@pytest.mark.parametrize("size", SIZES)
def test_torchscript_equals_eager(graph: type[OneGraph], scripted: torch.jit.ScriptModule, size: str) -> None:
    want = eager(graph, SIZES[size])
    compare(dict(zip(want, scripted(*SIZES[size].tensors()), strict=True)), want)
