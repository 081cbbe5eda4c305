"""The public functions: inspect, plan, compile, load, verify."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvc import artifact, compiler, placement
from tvc.export.base import target as find_target
from tvc.model import CompiledModel
from tvc.policy import Policy, ResolvedPolicy, load_policy, resolve
from tvc.program import Program
from tvc.report.cost import one_image
from tvc.report.plan import Plan
from tvc.report.schedule import make_plan, plan_policy
from tvc.runtime.engine import Engine
from tvc.runtime.inputs import check_sample
from tvc.trace.load import Source, in_evaluation
from tvc.trace.load import load as load_source
from tvc.trace.survey import Survey, survey
from tvc.verification.check import check

ModelLike = str | os.PathLike[str] | torch.nn.Module
PolicyLike = str | os.PathLike[str] | Mapping[str, Any] | Policy
Progress = Callable[[str], None]


def _silent(_line: str) -> None:
    return None


def inspect(
    model: ModelLike, *, inputs: Mapping[str, Any] | None = None, processor: Any = None, progress: Progress = _silent
) -> Program:
    """Traces a model: its components as graphs, its sites (legal or why not) and its token counts.

    Args:
        model: hub id, directory or module.
        inputs: processor outputs to trace with; default: two pictures made for the purpose.

    Raises:
        ModelError: it is no vision-language model. TraceError: `torch.export` cannot trace it.
    """
    source = load_source(model, processor=processor)
    with in_evaluation(source.model):
        return compiler.trace(source.model, _survey(source, inputs), progress=progress)


def plan(
    model: ModelLike,
    policy: PolicyLike,
    text_tokens: int = 64,
    *,
    average_tokens: float | None = None,
    image_size: tuple[int, int] | None = None,
    new_tokens: int = 64,
    processor: Any = None,
) -> Plan:
    """Tokens per layer, FLOPs and cache bytes of `policy` on `model`, from its configuration alone.

    Args:
        text_tokens: text tokens of the prompt.
        average_tokens: scale the budgets so that the decoder's layers hold this many visual tokens on average.
        image_size: (height, width) of the image, for models whose token count depends on it.
    """
    source = load_source(model, weights=False, processor=processor)
    layout = one_image(survey(source.meta, source.processor, image_size=image_size).layout)
    loaded = load_policy(policy)
    return plan_policy(loaded, layout, text_tokens=text_tokens, new_tokens=new_tokens, average_tokens=average_tokens)


def compile(  # noqa: A001  the public name
    model: ModelLike,
    policy: PolicyLike,
    target: str = "torch",
    *,
    inputs: Mapping[str, Any] | None = None,
    verify: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    processor: Any = None,
    progress: Progress = _silent,
) -> CompiledModel:
    """The model with the policy's reductions in its graphs, ready to be called, to generate and to be saved.

    Args:
        model: hub id, directory or module; it is not changed, and is compiled as it is in evaluation mode.
        policy: preset name, path, YAML text, mapping or `Policy`.
        target: `torch`, `pt2`, `torchscript` or `ort`.
        inputs: processor outputs to trace and verify with; default: pictures made for the purpose.
        verify: compare with the untouched model before handing over.

    Raises:
        PolicyError, SiteError: the policy is wrong, or this model cannot do it.
        VerificationError: the compiled model is not what the policy defines.
    """
    find_target(target)
    loaded = load_policy(policy)
    clock = _Clock(progress)
    prepared = Prepared(model, inputs=inputs, device=device, dtype=dtype, processor=processor, progress=clock)
    return prepared.compile(loaded, target, verify=verify, progress=clock)


class Prepared:
    """A model that policies are compiled for: loaded and surveyed once, and traced once for all that cut it alike.

    `tvc.compile` makes one for itself; whoever compares policies on a model makes one for all of them.
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        inputs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        processor: Any = None,
        progress: Progress = _silent,
    ):
        """Takes what `compile` takes."""
        device, dtype = placement.device_of(device), placement.dtype_of(dtype)
        if inputs is not None:
            check_sample(inputs)
        progress("load")
        self.source, self.inputs = load_source(model, device=device, dtype=dtype, processor=processor), inputs
        progress("survey")
        with in_evaluation(self.source.model):
            self.survey = _survey(self.source, inputs)
        self._traces: dict[tuple[str, ...], Program] = {}

    def compile(
        self, policy: PolicyLike, target: str = "torch", *, verify: bool = True, progress: Progress = _silent
    ) -> CompiledModel:
        """As the function of that name."""
        find_target(target)
        loaded = load_policy(policy)
        clock = progress if isinstance(progress, _Clock) else _Clock(progress)
        with in_evaluation(self.source.model):
            resolved = resolve(loaded, self.survey.layout)
            program = compiler.reduce(self._traced(resolved, clock), resolved, clock)
            given, seconds = self.inputs is not None, clock.seconds
            parts = (self.source, self.survey, resolved, program)
            compiled = finish(*parts, target, clock, given_sample=given, timings=seconds)
            if verify:
                clock("verify")
                compiled.verification = check(compiled, self.source.model, self.inputs).to_json()
        clock("done")
        return compiled

    def _traced(self, resolved: ResolvedPolicy, progress: Progress) -> Program:
        """The components before any reduction; a cut inside the encoder is marked while that is traced."""
        cuts = tuple(step.at for step in resolved.steps if step.at.startswith("vision."))
        if cuts not in self._traces:
            self._traces[cuts] = compiler.trace(self.source.model, self.survey, resolved, progress)
        traced = self._traces[cuts]
        parts = {name: dataclasses.replace(part, meta=dict(part.meta)) for name, part in traced.components.items()}
        return dataclasses.replace(traced, components=parts)


class _Clock:
    """Passes step names on, and notes how long each step took."""

    def __init__(self, progress: Progress):
        self.progress, self.seconds = progress, dict[str, float]()
        self._name, self._since = "", time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now
        self.progress(name)


def finish(
    source: Source,
    surveyed: Survey,
    resolved: ResolvedPolicy,
    program: Program,
    target: str,
    progress: Progress = _silent,
    *,
    given_sample: bool = False,
    timings: dict[str, float] | None = None,
) -> CompiledModel:
    """The reduced program lowered and opened for one target."""
    lowered = compiler.lower(program, target, progress)
    shape = program.components["decoder"].meta["shape"]
    own = dict(source.model.named_parameters())  # type: ignore[union-attr]
    surveyed.host.adopt_constants({name: own[name] for name in surveyed.host.constants()})
    runner, folder = (compiler.GraphRunner(lowered), None)
    if target != "torch":
        progress(f"write {target}")
        runner, folder = artifact.open_temporarily(lowered, target, shape.device)
    compiled = CompiledModel(
        Engine(surveyed.host, compiler.interface_of(lowered, resolved, surveyed), runner),
        target=target,
        policy=resolved,
        plan=make_plan(resolved, one_image(surveyed.layout)),
        config=source.model.config,  # type: ignore[union-attr]
        generation_config=getattr(source.model, "generation_config", None),
        processor=source.processor,
        device=shape.device,
        folder=folder,
    )
    compiled.saver = lambda place, overwrite: artifact.save(
        place,
        lowered,
        compiled,
        source,
        surveyed,
        given_sample=given_sample,
        overwrite=overwrite,
        timings=timings or {},
    )
    return compiled


def load(
    folder: str | os.PathLike[str], device: torch.device | str | None = None, *, threads: int = 0
) -> CompiledModel:
    """Opens an artifact directory; the runtime is the one it was compiled for.

    Args:
        folder: what `save_pretrained` or `tvc compile` wrote.
        threads: threads of one operator in ONNX Runtime; 0 leaves the choice to it.

    Raises:
        ArtifactError: it is no artifact, incomplete, changed or unsafe.
    """
    return artifact.open_artifact(folder, device=placement.device_of(device), threads=threads)


def _survey(source: Source, inputs: Mapping[str, Any] | None) -> Survey:
    if inputs is not None:
        check_sample(inputs)
    return survey(source.meta, source.processor, inputs)
