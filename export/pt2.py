"""Targets `pt2` and `torch`: every component as a PT2 archive without weights, and one safetensors file for all.

`torch.export.save` writes a tensor once an archive, so a tied embedding would be stored with `embed` and with
`decoder`, and large models twice. Here each weight of a program is turned into an input of it first: what remains is
a graph of some hundred kilobytes, which `torch.export.load` reads, and the tensors lie in `model.safetensors`, each
once.

A PT2 archive can carry pickled payloads, and its sizes are expressions that torch evaluates: `manifest.read` has
compared the file with its digest before it is opened, and an archive with a pickled payload is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from tvc.errors import ArtifactError
from tvc.export.base import DEFAULTS, Options, ordered, register
from tvc.program import Program

WEIGHTS = "model.safetensors"
INDEX = "weights.json"
_CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.data_ptr() or id(tensor),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
        str(tensor.device),
    )


def without_weights(
    exported: torch.export.ExportedProgram,
) -> tuple[torch.export.ExportedProgram, dict[str, torch.Tensor]]:
    """A copy of the program with its used weights as its first inputs, and those weights in order."""
    graph = _without_traces(exported.graph)
    root = torch.nn.Module()
    for node in graph.find_nodes(op="get_attr"):  # the condition or the body of a loop
        inner = getattr(exported.graph_module, str(node.target))
        root.add_module(str(node.target), torch.fx.GraphModule(inner, _without_traces(inner.graph)))
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    weights: dict[str, torch.Tensor] = {}
    kept: list[InputSpec] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in _CONSTANTS:
            kept.append(spec)
            continue
        node = nodes[spec.arg.name]
        if not node.users:
            graph.erase_node(node)
            continue
        tensor = exported.state_dict.get(spec.target)
        weights[spec.arg.name] = exported.constants[spec.target] if tensor is None else tensor
        kept.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=spec.arg.name), target=None))
    count = sum(1 for spec in kept if spec.kind == InputKind.USER_INPUT)
    entry = exported.module_call_graph[0]
    arguments = pytree.tree_flatten(((0,) * count, {}))[1]
    inputs = [copy.copy(spec.arg) for spec in kept if spec.kind == InputKind.USER_INPUT]
    called = dataclasses.replace(
        entry, signature=dataclasses.replace(entry.signature, inputs=inputs, in_spec=arguments, forward_arg_names=None)
    )
    stripped = torch.export.ExportedProgram(
        root=torch.fx.GraphModule(root, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(kept, list(exported.graph_signature.output_specs)),
        state_dict={},
        range_constraints=exported.range_constraints,
        module_call_graph=[called],
        example_inputs=None,
        constants={},
    )
    return stripped, weights


def _without_traces(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy; of the notes on a node the values and the history stay: stack traces name files of this machine."""
    plain = copy.deepcopy(graph)
    for node in plain.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in ("val", "custom")}
    return plain


def _unsafe(path: Path) -> str | None:
    """The first entry of an archive that would be unpickled, or None."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            part = name.split("/", 1)[-1]
            described = part in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
            if described and json.loads(archive.read(name)) == {"config": {}}:
                continue
            if part.startswith("data/") and archive.getinfo(name).file_size:
                return name
    return None


class ProgramRunner:
    """Runs the graphs with the weights that all of them share."""

    def __init__(
        self,
        graphs: Mapping[str, tuple[torch.nn.Module, list[torch.Tensor]]],
        names: Mapping[str, Mapping[str, list[str]]],
    ):
        self.graphs, self.names = graphs, names

    def __call__(self, component: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names, (graph, weights) = self.names[component], self.graphs[component]
        with torch.no_grad():
            results = graph(*weights, *ordered(component, names["inputs"], inputs))
        return dict(zip(names["outputs"], results, strict=True))


class Pt2:
    """The target's two halves."""

    keeps: frozenset[str] = frozenset()

    def __init__(self, name: str):
        self.name = name

    def write(self, program: Program, folder: Path, options: Options = DEFAULTS) -> list[Path]:
        stored: dict[tuple[Any, ...], str] = {}
        tensors: dict[str, torch.Tensor] = {}
        index: dict[str, list[str]] = {}
        files = []
        for name, component in program.components.items():
            stripped, weights = without_weights(component.exported)
            index[name] = []
            for weight, tensor in weights.items():
                key = _key(tensor)
                if key not in stored:
                    stored[key] = f"{name}.{weight}"
                    tensors[stored[key]] = tensor.detach().contiguous()
                index[name].append(stored[key])
            files.append(folder / f"{name}.pt2")
            torch.export.save(stripped, files[-1])
        safetensors.torch.save_file({k: _own(v) for k, v in tensors.items()}, folder / WEIGHTS)
        (folder / INDEX).write_text(json.dumps(index) + "\n")
        return [*files, folder / WEIGHTS, folder / INDEX]

    def open(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        device: torch.device | str | None = None,
        options: Options = DEFAULTS,
    ) -> ProgramRunner:
        folder, place = Path(folder), torch.device(device or "cpu")
        tensors = safetensors.torch.load_file(folder / WEIGHTS, device=str(place))
        index = json.loads((folder / INDEX).read_text())
        graphs = {}
        for name in manifest["components"]:
            exported = _load(folder / f"{name}.pt2")
            if place.type != "cpu":
                exported = move_to_device_pass(exported, str(place))
            graphs[name] = exported.graph_module, [tensors[weight] for weight in index[name]]
        return ProgramRunner(graphs, manifest["components"])


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of its own size: safetensors refuses views of shared memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _load(path: Path) -> torch.export.ExportedProgram:
    try:
        entry = _unsafe(path)
        exported = torch.export.load(path) if entry is None else None
    except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            "torch cannot read the program archive",
            where=str(path),
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            want=f"an archive that torch {torch.__version__} reads",
            fix="compile the artifact again with the installed torch",
        ) from error
    if exported is None:
        raise ArtifactError(
            "the program archive carries a payload that this compiler never writes",
            where=str(path),
            got=entry,
            want="a graph without weights, constants or compiled code",
            fix="do not open this artifact; compile the model again",
            slug="unsafe-artifact",
        )
    return exported


register(Pt2("pt2"))
register(Pt2("torch"))
