"""The pipeline: model -> traced program -> reduced program -> program of one target, as lists a person can read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from tvc.export.base import target as find_target
from tvc.graphs import open_draft
from tvc.kernels.op import OPS
from tvc.kernels.providers import PROVIDED, dispatched
from tvc.passes.base import Pass
from tvc.passes.fuse_attention import FuseAttention
from tvc.passes.insert_reductions import InsertReductions
from tvc.passes.lower_ops import LowerOps
from tvc.passes.rebind_cuts import RebindCuts
from tvc.passes.retrace import Retrace
from tvc.policy import ResolvedPolicy
from tvc.program import Program
from tvc.runtime.engine import Interface
from tvc.trace.decoder import capture_decoder, capture_embeddings
from tvc.trace.parts import decoder_weight
from tvc.trace.survey import Survey
from tvc.trace.vision import capture_vision

Progress = Callable[[str], None]


def trace(model: Any, survey: Survey, policy: ResolvedPolicy | None = None, progress: Progress = print) -> Program:
    """Every component of `model`, before any reduction (a cut inside the vision encoder is marked while tracing)."""
    parameter = decoder_weight(model)
    shape = survey.shape(parameter.dtype, parameter.device)
    sites = [step.at for step in policy.steps if step.at.startswith("vision.")] if policy is not None else []
    components = {}
    if survey.boundary.traced:
        progress("trace vision")
        components["vision"] = capture_vision(model, survey.host, survey.sample, sites)
    progress("trace decoder")
    components |= capture_embeddings(model, survey.host.tables)
    windows = {layer.window for layer in survey.layout.language}
    components["decoder"] = capture_decoder(model, survey.boundary, shape, survey.arguments, windows)
    return Program(survey.layout, components, facts=frozenset({"traced"}))


def reduce(program: Program, policy: ResolvedPolicy, progress: Progress = print) -> Program:
    """The program with the policy's reductions in it; ops are still whole."""
    passes: list[Pass] = [InsertReductions(policy), RebindCuts(), Retrace()]
    return run(program, passes, progress)


def lower(program: Program, target: str, progress: Progress = print) -> Program:
    """The program in the operators that `target` takes."""
    device = program.components["decoder"].meta["shape"].device
    keep = kept(target, device)
    fusions: list[Pass] = [FuseAttention()] if "attend" in keep else []
    return run(program, [*fusions, LowerOps(keep)], progress)


def kept(target: str, device: torch.device) -> frozenset[str]:
    """Ops that reach `target` whole: those it runs itself, and in PyTorch on CUDA those that have kernels there."""
    own = find_target(target).keeps
    return own | PROVIDED if target == "torch" and device.type == "cuda" else own


def run(program: Program, passes: list[Pass], progress: Progress) -> Program:
    for step in passes:
        progress(step.name)
        program = step(program)
    return program


def interface_of(program: Program, policy: ResolvedPolicy, survey: Survey) -> Interface:
    """What the runtime needs to know of the program's graphs."""
    parts = program.components
    sites: dict[str, str] = {}
    for step in policy.steps:
        component = step.at.split(".")[0]
        if component == "vision":  # what the encoder tells is what the last of its cuts left
            sites = {}
        if component != "language":
            sites[step.at] = component
    for stage in program.stages:
        if stage.site is not None:
            sites[stage.site] = f"key_positions.{stage.index}"
    stage_of_layer = tuple(stage.index for stage in program.stages for _ in stage.layers)
    taps = {**parts["decoder"].meta.get("tap_widths", {})}
    if "projector" in parts:
        taps |= parts["projector"].meta.get("tap_widths", {})
    return Interface(
        inputs={name: part.inputs for name, part in parts.items()},
        outputs={name: part.outputs for name, part in parts.items()},
        sites=sites,
        stage_of_layer=stage_of_layer,
        shape=parts["decoder"].meta["shape"],
        visual_token_ids=survey.visual_token_ids,
        taps=taps,
        by_image="vision" in parts and parts["vision"].meta["by_image"],
        words=parts["vision"].meta["words"] if "vision" in parts else {},
        windows=tuple(sorted({layer.window for layer in program.layout.language})),
    )


def called(module: fx.GraphModule) -> fx.GraphModule:
    """The graph, for CUDA, with ops that have kernels called as functions: torch's dispatcher would cost more."""
    functions = {op.overload: dispatched(op.name, op.reference) for op in OPS.values() if op.name in PROVIDED}
    for node in module.graph.nodes:
        node.target = functions.get(node.target, node.target)
    module.recompile()
    return module


@dataclasses.dataclass
class GraphRunner:
    """Runs the exported programs in this process."""

    program: Program
    options: Mapping[str, Any] | None = None  # for torch.compile; None: graphs run operator by operator

    def __post_init__(self) -> None:
        self._modules: dict[str, Any] = {}

    def compiled(self, options: Mapping[str, Any]) -> GraphRunner:
        """The same programs through `torch.compile`."""
        return GraphRunner(self.program, options)

    def __call__(self, component: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        part = self.program.components[component]
        if component not in self._modules:
            # Not `exported.module()`: it proves every size anew with sympy at each call, milliseconds a decode step.
            module: Any = open_draft(part)
            if self.options is not None:
                module = torch.compile(module, **self.options)
            elif self.program.components["decoder"].meta["shape"].device.type == "cuda":
                module = called(module)
            self._modules[component] = module
        with torch.no_grad():
            values = self._modules[component](*(inputs[name] for name in part.inputs))
        return dict(zip(part.outputs, values, strict=True))
