"""The pipeline: model -> traced program -> reduced program -> program of one target, as lists a person can read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from tvc.chunks import ENTERED
from tvc.export.base import target as find_target
from tvc.graphs import join_equal, open_draft, operators
from tvc.kernels.op import OPS
from tvc.kernels.providers import PROVIDED, dispatched
from tvc.passes.base import Pass
from tvc.passes.chunk_attention import ChunkAttention
from tvc.passes.fuse_attention import FuseAttention
from tvc.passes.insert_reductions import InsertReductions
from tvc.passes.lower_ops import LowerOps
from tvc.passes.pool_caches import PoolCaches
from tvc.passes.rebind_cuts import RebindCuts
from tvc.passes.reselect_keys import ReselectKeys
from tvc.passes.retrace import Retrace
from tvc.passes.text_only import without_cuts
from tvc.passes.unrotate_keys import UnrotateKeys
from tvc.policy import ResolvedPolicy
from tvc.policy.options import Chunks, Unrotated
from tvc.policy.positions import Rescale, stride_of
from tvc.program import Component, Program
from tvc.report.plan import Operators
from tvc.runtime.engine import Interface
from tvc.trace.decoder import capture_decoder, capture_embeddings
from tvc.trace.frequencies import rescaled
from tvc.trace.parts import decoder_weight
from tvc.trace.survey import Survey
from tvc.trace.vision import capture_vision

Progress = Callable[[str], None]
# Whole, so that a chunk without visual tokens can go without them.
CUTS = frozenset({"shorten", "restore", "evict", "pool_cache", "remember", "unrotated_keys"})


def trace(model: Any, survey: Survey, policy: ResolvedPolicy | None = None, progress: Progress = print) -> Program:
    """Every component of `model`, before any reduction (a cut inside the vision encoder is marked while tracing)."""
    parameter = decoder_weight(model)
    shape = survey.shape(parameter.dtype, parameter.device, 0 if policy is None else stride_of(policy.positions))
    sites = [step.at for step in policy.steps if step.at.startswith("vision.")] if policy is not None else []
    components = {}
    if survey.boundary.traced:
        progress("trace vision")
        components["vision"] = capture_vision(model, survey.host, survey.sample, sites)
    progress("trace decoder")
    components |= capture_embeddings(model, survey.host.tables)
    windows = {layer.window for layer in survey.layout.language}
    rule = policy.positions if policy is not None else None
    with contextlib.ExitStack() as stack:
        if isinstance(rule, Rescale):
            settings = (rule.factor, rule.window, rule.fast, rule.slow)
            stack.enter_context(rescaled(model.get_decoder(), *settings))
        components["decoder"] = capture_decoder(model, survey.boundary, shape, survey.arguments, windows)
    return Program(survey.layout, components, facts=frozenset({"traced"}))


def reduce(program: Program, policy: ResolvedPolicy, progress: Progress = print) -> Program:
    """The program with the policy's reductions in drafts of its graphs; ops are still whole."""
    rule = policy.attention
    chunks: list[Pass] = [ChunkAttention(rule)] if isinstance(rule, Chunks) else []
    turning: list[Pass] = [UnrotateKeys()] if isinstance(rule, Unrotated) else []
    pools: list[Pass] = [] if policy.cache is None else [PoolCaches(policy.cache)]
    decoding: list[Pass] = [] if policy.reselect is None else [ReselectKeys(policy.reselect)]
    return run(program, [*chunks, InsertReductions(policy), RebindCuts(), *pools, *decoding, *turning], progress)


def lower(program: Program, target: str, progress: Progress = print) -> Program:
    """The program in the operators that `target` takes."""
    device = program.components["decoder"].meta["shape"].device
    keep = kept(target, device)
    fusions: list[Pass] = [Retrace(), FuseAttention()] if "attend" in keep else []
    return run(program, [*fusions, LowerOps(keep)], progress)


def kept(target: str, device: torch.device) -> frozenset[str]:
    """Ops that reach `target` whole: those it runs itself; in PyTorch also cuts, and on CUDA all that have kernels."""
    own = find_target(target).keeps
    if target != "torch":
        return own
    return own | CUTS | (PROVIDED if device.type == "cuda" else frozenset())


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
            entered = f"{ENTERED}{stage.index}"  # what stays from a cut on, where later ones take some of it away
            sites[stage.site] = entered if entered in parts["decoder"].outputs else f"key_positions.{stage.index}"
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


def operator_counts(program: Program) -> tuple[Operators, ...]:
    """How many operators each graph of a lowered program holds; those of a decode step where they are others."""
    counts = [Operators(name, *operators(part.exported.graph)) for name, part in program.components.items()]
    draft = open_draft(program.components["decoder"])
    step = without_cuts(draft)
    return (*counts, Operators("decode step", *operators(step.graph))) if step is not draft else tuple(counts)


def called(module: fx.GraphModule, kernels: bool) -> fx.GraphModule:
    """The graph with ops that are whole called as functions: torch's dispatcher would cost more.

    Args:
        kernels: for CUDA, where ops run their kernels; else they run their references.
    """
    whole = {op.overload: op for op in OPS.values() if op.name in PROVIDED | CUTS}
    for node in module.graph.nodes:
        op = whole.get(node.target)
        if op is not None:
            node.target = dispatched(op.name, op.reference) if kernels and op.name in PROVIDED else op.reference
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
        text_only = component == "decoder" and inputs["visual_index"].shape[1] == 0
        name = f"{component}, text only" if text_only else component
        if name not in self._modules:
            self._modules[name] = self._opened(part, text_only)
        with torch.no_grad():
            values = self._modules[name](*(inputs[name] for name in part.inputs))
        return dict(zip(part.outputs, values, strict=True))

    def _opened(self, part: Component, text_only: bool) -> Any:
        # Not `exported.module()`: it proves every size anew with sympy at each call, milliseconds a decode step.
        module: Any = open_draft(part)
        if text_only:
            module = without_cuts(module)
        # What a pass made anew behind a cut may stand there already, or be the same twice.
        join_equal(module.graph)
        if self.options is not None:
            return torch.compile(module, **self.options)
        return called(module, self.program.components["decoder"].meta["shape"].device.type == "cuda")
