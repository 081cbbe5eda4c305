"""Target `torchscript` (legacy): every component as a submodule of one TorchScript file, `model.ts`.

TorchScript is deprecated in PyTorch and gets no further development; this target exists for runtimes that read
nothing else (libtorch of older versions, Triton Inference Server's libtorch backend). Each graph is rebuilt as a
plain module in the words that `torch.jit.script` knows: sizes by `Tensor.size`, operators by overload packet, no
assertions, sizes read out of tensors by `int`. The components lie in one file because TorchScript then stores a
tensor that several of them hold once.

`torch.jit.load` reads pickled data; it is called only after `manifest.read` has compared the file with its digest.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from tvc.errors import ArtifactError, ExportError
from tvc.export.base import DEFAULTS, Options, ordered, register
from tvc.program import Component, Program

FILE = "model.ts"
A = torch.ops.aten
_DROPPED = {
    "_assert_scalar",
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_check",
}
_CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


# Functions of sizes that scripting knows under another name.
_SYMBOLIC: dict[Any, Callable[..., Any]] = {
    torch.sym_max: max,
    torch.sym_min: min,
    torch.sym_not: operator.not_,
    torch.sym_float: float,
    torch.sym_int: int,
}


def _dropped(node: fx.Node) -> bool:
    """Assertions and range hints: they compute nothing."""
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0] in _DROPPED


def _target(node: fx.Node, component: str) -> Any:
    if node.target in _SYMBOLIC:
        return _SYMBOLIC[node.target]
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in ("aten", "prims"):
            raise ExportError(
                "TorchScript cannot hold this operator",
                where=f"component {component}, node {node.name}",
                got=str(node.target),
                want="ATen operators",
                fix="lower every operator of this compiler before this target, or choose the target torch",
            )
        return node.target.overloadpacket
    return node.target


def _copy(plain: fx.Graph, node: fx.Node, known: Mapping[fx.Node, Any], device: Any, component: str) -> Any:
    """`node` in the words of TorchScript; `device` is the node that gives the device of the inputs."""

    def old(value: Any) -> Any:
        return fx.node.map_arg(value, known.__getitem__)

    if node.target == A.sym_size.int:
        return plain.call_method("size", old(node.args))
    if node.target == A.sym_stride.int:
        return plain.call_method("stride", old(node.args))
    if node.target == A.sym_numel.default:
        return plain.call_method("numel", old(node.args))
    if node.target == torch.sym_sum:
        return functools.reduce(lambda a, b: plain.call_function(operator.add, (a, b)), old(node.args[0]))
    if node.target in (A._local_scalar_dense.default, A.item.default):
        read = plain.call_method("item", old(node.args))
        return plain.call_function(float if isinstance(node.meta.get("val"), (float, torch.SymFloat)) else int, (read,))
    if node.target == A._to_copy.default:
        place = [device] if node.kwargs.get("device") is not None else []
        kind = [node.kwargs["dtype"]] if node.kwargs.get("dtype") is not None else []
        return (
            plain.call_method("to", (old(node.args[0]), *place, *kind))
            if place or kind
            else plain.call_function(A.clone, old(node.args))
        )
    kwargs = {name: old(value) for name, value in node.kwargs.items() if name not in ("layout", "pin_memory")}
    if kwargs.get("device") is not None:
        kwargs["device"] = device  # the file is not bound to the device that traced it
    return plain.call_function(_target(node, component), old(node.args), kwargs)


def plain_module(component: Component) -> fx.GraphModule:
    """The component's graph as a module that `torch.jit.script` accepts; weights shared with the component.

    Raises:
        ExportError: The graph holds an operator without a TorchScript form.
    """
    exported = component.exported
    root, plain, known = torch.nn.Module(), fx.Graph(), {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    names = iter(component.inputs)
    for node in exported.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind in _CONSTANTS:
            if node.users:
                tensor = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
                root.register_buffer(node.name, tensor.detach())
                known[node] = plain.get_attr(node.name)
        else:
            known[node] = plain.placeholder(next(names).replace(".", "_"))
    return _filled(root, plain, known, exported.graph_module, component.name)


def _filled(
    root: torch.nn.Module,
    plain: fx.Graph,
    known: dict[fx.Node, Any],
    source: fx.GraphModule,
    component: str,
    many: bool = False,
) -> fx.GraphModule:
    """`root` and `plain`, which has its inputs already, with all other nodes of `source`.

    `many`: inputs and outputs are lists, as a loop has them.
    """
    device = None
    for node in source.graph.nodes:
        if node.op in ("placeholder", "get_attr") or _dropped(node):  # attributes: the graphs of a loop, read there
            continue
        if node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else node.args  # a condition has one
            results = fx.node.map_arg(tuple(results), known.__getitem__)
            plain.output(list(results) if many else results)
            continue
        if device is None:
            first = next(n for n in plain.nodes if n.op == ("call_function" if many else "placeholder"))
            device = plain.call_function(getattr, (first, "device"))
        if node.target is torch.ops.higher_order.while_loop:
            loop, inputs = _loop(source, node, component)
            root.add_module(node.name, loop)
            state, fixed, sizes = fx.node.map_arg(inputs, known.__getitem__)
            # Its fuser loses a tensor that goes into a list and into later arithmetic, once sizes are not those it met.
            fixed = [plain.call_function(A.detach, (value,)) for value in fixed]
            known[node] = plain.call_module(node.name, (state, fixed, sizes))
        else:
            known[node] = _copy(plain, node, known, device, component)
    plain.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    plain.lint()
    return fx.GraphModule(root, plain)


class Loop(torch.nn.Module):
    """TorchScript has loops, graphs of plain modules have none; lists, so that one text serves any number of values."""

    def __init__(self, condition: torch.nn.Module, body: torch.nn.Module):
        super().__init__()
        self.condition, self.body = condition, body

    def forward(self, state: list[torch.Tensor], fixed: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        while bool(self.condition(state, fixed, sizes)[0]):
            state = self.body(state, fixed, sizes)
        return state


def _loop(source: fx.GraphModule, node: fx.Node, component: str) -> tuple[Loop, tuple[list[Any], list[Any], list[Any]]]:
    """A `while_loop` node as a module, and what it takes: the state, the tensors and the sizes that stay the same."""
    condition, body, carried, constant = node.args
    state, constants = list(carried), list(constant)  # type: ignore[arg-type]
    fixed = [value for value in constants if _is_tensor(value)]
    sizes = [value for value in constants if not _is_tensor(value)]
    parts = []
    for part in (condition, body):
        inner = getattr(source, str(part.target))  # type: ignore[union-attr]
        plain, known = fx.Graph(), {}
        lists = {
            name: plain.placeholder(name, type_expr=kind)
            for name, kind in (("state", list[torch.Tensor]), ("fixed", list[torch.Tensor]), ("sizes", list[int]))
        }
        places = [("state", i) for i in range(len(state))]
        places += [
            ("fixed", fixed.index(value)) if _is_tensor(value) else ("sizes", sizes.index(value)) for value in constants
        ]
        for value, (name, place) in zip(inner.graph.find_nodes(op="placeholder"), places, strict=True):
            known[value] = plain.call_function(operator.getitem, (lists[name], place))
        parts.append(_filled(torch.nn.Module(), plain, known, inner, component, many=True))
    # A list without a value would be taken for one of tensors.
    return Loop(*parts), (state, [*fixed, state[0]], [*sizes, 0])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


class ScriptRunner:
    """Runs the components of a loaded file."""

    def __init__(self, module: torch.jit.ScriptModule, names: Mapping[str, Mapping[str, list[str]]]):
        self.module, self.names = module, names

    def __call__(self, component: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = self.names[component]
        with torch.no_grad():
            results = getattr(self.module, component)(*ordered(component, names["inputs"], inputs))
        return dict(zip(names["outputs"], results, strict=True))


class TorchScript:
    """The target's two halves."""

    name = "torchscript"
    keeps: frozenset[str] = frozenset()

    def write(self, program: Program, folder: Path, options: Options = DEFAULTS) -> list[Path]:
        whole = torch.nn.Module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, component in program.components.items():
                try:
                    whole.add_module(name, torch.jit.script(plain_module(component)))
                except (RuntimeError, torch.jit.frontend.NotSupportedError) as error:
                    raise ExportError(
                        "TorchScript refuses the graph",
                        where=f"component {name}",
                        got=next((line for line in str(error).splitlines() if line.strip()), type(error).__name__),
                        want="a graph that torch.jit.script compiles",
                        fix="choose the target torch or ort",
                    ) from error
            torch.jit.save(torch.jit.script(whole.eval()), str(folder / FILE))
        return [folder / FILE]

    def open(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        device: torch.device | str | None = None,
        options: Options = DEFAULTS,
    ) -> ScriptRunner:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = torch.jit.load(str(Path(folder) / FILE), map_location=device or "cpu")
        except RuntimeError as error:
            raise ArtifactError(
                "torch cannot read the TorchScript file",
                where=str(Path(folder) / FILE),
                got=str(error).splitlines()[0],
                want=f"a file that torch {torch.__version__} reads",
                fix="compile the artifact again with the installed torch",
            ) from error
        return ScriptRunner(module, manifest["components"])


register(TorchScript())
