"""The public functions: inspect, plan, compile, load, verify."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from tvc import artifact, compiler, placement
from tvc.errors import ExportError, ModelError, TraceError, TvcError
from tvc.export.base import target as find_target
from tvc.model import CompiledModel
from tvc.policy import Policy, ResolvedPolicy, load_policy, resolve
from tvc.policy.positions import Positions, traced_as
from tvc.policy.weights import check_weights
from tvc.program import Layout, Program
from tvc.report.budget import settings_at, share_of
from tvc.report.cost import one_image, shown
from tvc.report.plan import Plan
from tvc.report.schedule import make_plan, plan_policy
from tvc.runtime.engine import Engine
from tvc.runtime.inputs import check_sample
from tvc.trace.load import Source, in_evaluation, meta_copy
from tvc.trace.load import load as load_source
from tvc.trace.survey import Survey, survey
from tvc.trace.untraced import Borrowed
from tvc.verification.check import check

ModelLike = str | os.PathLike[str] | torch.nn.Module
PolicyLike = str | os.PathLike[str] | Mapping[str, Any] | Policy
Progress = Callable[[str], None]
_T = TypeVar("_T")


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
    return Prepared(model, inputs=inputs, processor=processor, progress=progress).program(progress)


def plan(
    model: ModelLike,
    policy: PolicyLike,
    text_tokens: int = 64,
    *,
    budget: str | None = None,
    average_tokens: float | None = None,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
    new_tokens: int = 64,
    processor: Any = None,
) -> Plan:
    """Tokens per layer, FLOPs and cache bytes of `policy` on `model`, from its configuration alone.

    Args:
        text_tokens: text tokens of the prompt.
        budget: a share of the visual tokens (`33%`): the settings that the policy has for it, else all its numbers of
            tokens times one factor, so that its last cut leaves that share.
        average_tokens: scale the budgets so that the decoder's layers hold this many visual tokens on average.
        image_size: (height, width) of the image, for models whose token count depends on it.
        frames: plan a video of so many frames in the place of the image, counted as the decoder sees them (Qwen2-VL's
            show two pictures each); one video where its positions tell frames, elsewhere as many images.
    """
    layout = one_image(layout_of(model, processor=processor, image_size=image_size))
    layout = layout if frames is None else shown(layout, frames)
    loaded = load_policy(policy) if budget is None else _at_share(load_policy(policy), layout, budget)
    made = plan_policy(loaded, layout, text_tokens=text_tokens, new_tokens=new_tokens, average_tokens=average_tokens)
    return made if budget is None else dataclasses.replace(made, budget=share_of(budget, "--budget"))


def at_budget(policy: Policy, layout: Layout, budget: str | None) -> Policy:
    """The policy at a share of the visual tokens of one image, see `plan`; as it is where no budget is given."""
    return policy if budget is None else _at_share(policy, one_image(layout), budget)


def _at_share(policy: Policy, layout: Layout, budget: str) -> Policy:
    return policy.with_settings(settings_at(policy, layout, share_of(budget, "--budget")))


def compile(  # noqa: A001  the public name
    model: ModelLike,
    policy: PolicyLike,
    target: str = "torch",
    *,
    inputs: Mapping[str, Any] | None = None,
    budget: str | None = None,
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
        budget: a share of the visual tokens, as for `plan`; None leaves the policy as it is.
        verify: compare with the untouched model before handing over.

    Raises:
        PolicyError, SiteError: the policy is wrong, or this model cannot do it.
        VerificationError: the compiled model is not what the policy defines.
    """
    find_target(target)
    loaded = load_policy(policy)
    if budget is not None:
        share_of(budget, "--budget")  # a mistake in it is told before a model is loaded
    clock = _Clock(progress)
    prepared = Prepared(model, inputs=inputs, device=device, dtype=dtype, processor=processor, progress=clock)
    loaded = at_budget(loaded, prepared.survey.layout, budget)
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
        self._traces: dict[tuple[tuple[str, ...], Positions], Program] = {}
        with in_evaluation(self.source.model):
            try:
                self.survey = _survey(self.source, inputs)
            except ModelError as problem:
                if problem.slug not in UNTRACED:
                    raise
                self._leave_vision(problem)

    def compile(
        self, policy: PolicyLike, target: str = "torch", *, verify: bool = True, progress: Progress = _silent
    ) -> CompiledModel:
        """As the function of that name."""
        find_target(target)
        loaded = load_policy(policy)
        clock = progress if isinstance(progress, _Clock) else _Clock(progress)
        with in_evaluation(self.source.model):
            program, resolved = self.reduce(loaded, clock)
            given, seconds = self.inputs is not None, clock.seconds
            parts = (self.source, self.survey, resolved, program)
            compiled = finish(*parts, target, clock, given_sample=given, timings=seconds)
            if verify:
                clock("verify")
                compiled.verification = check(compiled, self.source.model, self.inputs).to_json()
        clock("done")
        return compiled

    def _leave_vision(self, problem: TvcError) -> None:
        """From here on the vision path is the model's own code."""
        self.source, self.survey = _borrowing(self.source, problem, self.inputs)

    def reduce(self, policy: PolicyLike, progress: Progress = _silent) -> tuple[Program, ResolvedPolicy]:
        """The components with the policy in them, not lowered yet, and the policy on this model; see `finish`."""
        with in_evaluation(self.source.model):
            traced, resolved = self._traced(load_policy(policy), progress)
            return compiler.reduce(traced, resolved, progress), resolved

    def program(self, progress: Progress = _silent) -> Program:
        """The components before any reduction."""
        with in_evaluation(self.source.model):
            return self._following(lambda: self._components((), None, progress))

    def _traced(self, policy: Policy, progress: Progress) -> tuple[Program, ResolvedPolicy]:
        """The components before any reduction (a cut inside the encoder is marked while that is traced), and the policy
        on this model.
        """

        def attempt() -> tuple[Program, ResolvedPolicy]:
            resolved = resolve(policy, self.survey.layout)
            check_weights(resolved.steps, self.survey.layout)
            cuts = tuple(step.at for step in resolved.steps if step.at.startswith("vision."))
            return self._components(cuts, resolved, progress), resolved

        return self._following(attempt)

    def _following(self, attempt: Callable[[], _T]) -> _T:
        """What `attempt` gives; a vision path that it fails to trace is left to the model's own code."""
        try:
            return attempt()
        except TraceError as problem:
            if problem.where != "vision" or self.survey.layout.untraced:
                raise
            self._leave_vision(problem)
            return attempt()

    def _components(self, cuts: tuple[str, ...], resolved: ResolvedPolicy | None, progress: Progress) -> Program:
        key = (cuts, "keep" if resolved is None else traced_as(resolved.positions))
        if key not in self._traces:
            self._traces[key] = compiler.trace(self.source.model, self.survey, resolved, progress)
        traced = self._traces[key]
        parts = {name: dataclasses.replace(part, meta=dict(part.meta)) for name, part in traced.components.items()}
        return dataclasses.replace(traced, components=parts)


# Mistakes of a survey that only mean that the vision path cannot be run on shapes alone.
UNTRACED = ("not-surveyed", "sample-refused", "no-vision-path", "no-visual-features")


def layout_of(
    model: ModelLike,
    *,
    inputs: Mapping[str, Any] | None = None,
    processor: Any = None,
    image_size: tuple[int, int] | None = None,
) -> Layout:
    """What plans are made of, from the model's configuration; its weights are loaded only where its own code has to run
    to tell the visual tokens of an image.
    """
    source = load_source(model, weights=False, processor=processor)
    try:
        return survey(source.meta, source.processor, inputs, image_size=image_size).layout
    except ModelError as problem:
        if problem.slug not in UNTRACED:
            raise
        return _borrowing(load_source(model, processor=processor), problem, inputs, image_size)[1].layout


def _borrowing(
    source: Source,
    problem: TvcError,
    inputs: Mapping[str, Any] | None,
    image_size: tuple[int, int] | None = None,
) -> tuple[Source, Survey]:
    """A survey of the model whose vision path stays its own code, since `problem` is in the way of a trace."""
    model = source.model
    if model is None:
        raise problem
    source = dataclasses.replace(source, meta=meta_copy(model))
    borrowed = Borrowed(model, f"torch.export cannot follow the vision path ({problem.got})")
    surveyed = survey(source.meta, source.processor, inputs, image_size=image_size, borrowed=borrowed)
    return source, _with_constants(surveyed, model)


def _needs_graph(layout: Layout, where: str) -> ExportError:
    return ExportError(
        f"the vision path of {layout.model_type} is no graph that could be written to a file",
        where=where,
        got=layout.untraced,
        want="the target torch, in this process, where the model's own code runs the vision path",
        fix="compile with target torch and use the model that it returns",
        slug="untraced-vision",
    )


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
    if surveyed.layout.untraced and target != "torch":
        raise _needs_graph(surveyed.layout, f"target {target}")
    lowered = compiler.lower(program, target, progress)
    shape = program.components["decoder"].meta["shape"]
    runner, folder = (compiler.GraphRunner(lowered), None)
    if target != "torch":
        progress(f"write {target}")
        runner, folder = artifact.open_temporarily(lowered, target, shape.device)
    plan = make_plan(resolved, one_image(surveyed.layout))
    compiled = CompiledModel(
        Engine(surveyed.host, compiler.interface_of(lowered, resolved, surveyed), runner),
        target=target,
        policy=resolved,
        plan=dataclasses.replace(plan, operators=compiler.operator_counts(lowered)),
        config=source.model.config,  # type: ignore[union-attr]
        generation_config=getattr(source.model, "generation_config", None),
        processor=source.processor,
        device=shape.device,
        folder=folder,
    )

    def save(place: Path, overwrite: bool) -> None:
        if surveyed.layout.untraced:
            raise _needs_graph(surveyed.layout, "save_pretrained")
        artifact.save(
            place,
            lowered,
            compiled,
            source,
            surveyed,
            given_sample=given_sample,
            overwrite=overwrite,
            timings=timings or {},
        )

    compiled.saver = save
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
    surveyed = survey(source.meta, source.processor, inputs)
    return surveyed if source.model is None else _with_constants(surveyed, source.model)


def _with_constants(surveyed: Survey, model: torch.nn.Module) -> Survey:
    """The survey with the model's own constants in its host: family code reads them while it is traced, too."""
    own = dict(model.named_parameters())
    surveyed.host.adopt_constants({name: own[name] for name in surveyed.host.constants()})
    return surveyed
