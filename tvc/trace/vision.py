"""Captures the vision path: tower inputs -> visual features in the decoder's space, as one graph.

The family's own code between tower and projector (layer choice, CLS removal, pixel shuffle) is traced by running it:
the host's `get_image_features` is called with the sample; what comes before the tower runs as plain Python outside the
trace, what lies between tower and projector runs inside it, and the call ends at the projector's output.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils._python_dispatch import _disable_current_modes

import tvc.trace.cut_marker  # noqa: F401  registers torch.ops.tvc.cut_marker
from tvc.errors import TraceError
from tvc.graphs import drop_checks
from tvc.program import Component
from tvc.trace.attention import NAME as TRACED_ATTENTION
from tvc.trace.attention import attention_as
from tvc.trace.crossing import each_image_apart, images_of
from tvc.trace.exporters import prepare_vision_inputs, tracing_patches
from tvc.trace.host import Host, exit_leaves
from tvc.trace.layout import blocks, residual_argument

AUTO = torch.export.Dim.AUTO
OUTPUT = "visual_features"


class _Done(Exception):
    """Ends the family's code at the exit module, carrying its features."""

    def __init__(self, features: list[torch.Tensor]):
        self.features = features


PIXELS, SIZES = "pixel_values", "image_sizes"


@dataclasses.dataclass(frozen=True)
class VisionInputs:
    """The entry module's arguments: tensors become graph inputs, everything else is a constant of the trace.

    What the family's code hands around the entry to a module behind it (the question that a Q-Former reads) is `beside`
    these: model inputs by name, inputs of the graph as well.

    Some encoders loop over images padded to one size, each with its own size beside it: `by_image`. Their graph is that
    of one image, whose size is that of its pixels; a runtime runs it once an image.
    """

    tensors: dict[str, torch.Tensor]
    constants: dict[str, Any]
    by_image: bool = False
    beside: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def all(self) -> dict[str, torch.Tensor]:
        """Every input of the graph by name."""
        return {**self.tensors, **self.beside}


def split_inputs(arguments: Mapping[str, Any]) -> VisionInputs:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in arguments.items() if name not in tensors}
    if not lists_sizes(arguments):
        return VisionInputs(tensors, constants)
    one = next(each_image(arguments))
    return VisionInputs({PIXELS: one}, {name: value for name, value in constants.items() if name != SIZES}, True)


def lists_sizes(arguments: Mapping[str, Any]) -> bool:
    """Whether an encoder is given images padded to one size, and the size of each as whole numbers."""
    pixels, sizes = arguments.get(PIXELS), arguments.get(SIZES)
    return isinstance(pixels, torch.Tensor) and pixels.dim() == 4 and isinstance(sizes, list) and bool(sizes)


def each_image(arguments: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """[1, C, h, w] the pixels of one image after the other, without its padding."""
    for pixels, (height, width) in zip(arguments[PIXELS], arguments[SIZES], strict=True):
        yield pixels[None, :, :height, :width].contiguous()


class VisionPath(torch.nn.Module):
    """Entry to exit of the vision path of `model`, as a function of the entry's tensors."""

    def __init__(self, model: torch.nn.Module, host: Host, sample: Mapping[str, Any], inputs: VisionInputs):
        super().__init__()
        boundary = host.boundary
        # Registered under their own paths, so that every node knows the module of the user's model it came from.
        self.parts = torch.nn.ModuleDict(
            {path.replace(".", "_"): model.get_submodule(path) for path in boundary.vision}
        )
        self._paths = {path: path.replace(".", "_") for path in boundary.vision}
        self._host, self._sample, self._inputs = host, dict(sample), inputs

    def part(self, path: str) -> torch.nn.Module:
        return self.parts[self._paths[path]]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boundary = self._host.boundary
        given = dict(zip(self._inputs.all, tensors, strict=True))
        arguments = {name: given[name] for name in self._inputs.tensors} | self._inputs.constants
        sample = {**self._sample, **{name: given[name] for name in self._inputs.beside}}
        if self._inputs.by_image:
            height, width = arguments[PIXELS].shape[2:]
            arguments[SIZES] = [(height, width)]
            sample = {**sample, PIXELS: arguments[PIXELS], SIZES: arguments[SIZES]}
        outside = contextlib.ExitStack()  # open while the family's code before the tower runs untraced

        def entry(_pending: dict[str, Any]) -> Any:
            outside.close()
            output = self.part(boundary.entry)(**arguments)
            if boundary.entry == boundary.exit:
                raise _Done(exit_leaves(output))
            return output

        def leave(*args: Any, **kwargs: Any) -> Any:
            raise _Done(exit_leaves(self.part(boundary.exit)(*args, **kwargs)))

        between: dict[str, Callable[..., Any]] = {path: self.part(path) for path in boundary.between}
        with outside:
            outside.enter_context(_disable_current_modes())
            try:
                with self._host.bound(entry=entry, between=between, leave=leave):
                    self._host.image_features(sample)
            except _Done as done:
                return tuple(done.features)
        raise TraceError(
            "the vision path ended before its last module",
            where=boundary.exit,
            got="no call",
            want=f"a call of {boundary.exit}",
            fix="report the model class",
            slug="vision-path-changed",
        )


def _refuse_constants(exported: torch.export.ExportedProgram, images: int) -> None:
    """Refuses a graph that holds what family code made of the sample beside the tower: it would stay the sample's.

    Raises:
        TraceError: there is a constant with a row for each image of the sample.
    """
    lifted = _lifted(exported)
    for name, value in exported.constants.items():
        if name in lifted and isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == images:
            raise TraceError(
                "the model's own code hands something about the images around the vision tower",
                where="vision",
                got=f"a tensor of shape {list(value.shape)} that is computed from the inputs of the tower",
                want="features alone between encoder and projector",
                fix="compile with target torch, where the vision path stays the model's own code",
                slug="constant-in-vision",
            )


def _lifted(exported: torch.export.ExportedProgram) -> set[str]:
    specs = exported.graph_signature.input_specs
    return {str(spec.target) for spec in specs if spec.kind is InputKind.CONSTANT_TENSOR}


def entry_inputs(host: Host, sample: Mapping[str, Any]) -> VisionInputs:
    """What the entry module receives for `sample`, with the data-dependent tensors computed beforehand."""
    seen: dict[str, Any] = {}

    def entry(pending: dict[str, Any]) -> Any:
        seen.update(pending)
        raise _Done([])

    try:
        with host.bound(entry=entry):
            host.image_features(sample)
    except _Done:
        pass
    with attention_as(host.model, TRACED_ATTENTION):
        return split_inputs(prepare_vision_inputs(host.entry_module, seen))


# What torch.export raises for code that it cannot trace.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, LookupError)


def export(
    component: str, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], dynamic: Any
) -> torch.export.ExportedProgram:
    """`torch.export.export`, non-strict.

    Raises:
        TraceError: the module cannot be traced.
    """
    try:
        return functional(torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False))
    except REFUSALS as problem:
        lines = str(problem).strip().splitlines() or [""]
        raise TraceError(
            f"torch.export cannot trace the component {component}",
            where=component,
            got=f"{type(problem).__name__}: {lines[0][:300]}",
            want="modelling code without branches on values",
            fix="try a newer transformers release, or another attention implementation of the model",
        ) from problem


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without writes into tensors that other nodes read: a pass may then move and copy any node."""
    written = any(
        node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for node in exported.graph.nodes
    )
    return exported.run_decompositions({}) if written else exported


@contextlib.contextmanager
def tracing(model: torch.nn.Module) -> Iterator[None]:
    """Everything that has to hold while a component of `model` is exported."""
    with torch.no_grad(), attention_as(model, TRACED_ATTENTION), tracing_patches():
        yield


@contextlib.contextmanager
def _marked(model: torch.nn.Module, sites: Sequence[str]) -> Iterator[None]:
    """While traced, the inputs of the blocks named by `sites` pass through a cut marker."""
    layers = blocks(model)[1]

    def mark(number: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (torch.ops.tvc.cut_marker(args[0], number), *args[1:]), kwargs
            name = residual_argument(module)
            return args, {**kwargs, name: torch.ops.tvc.cut_marker(kwargs[name], number)}

        return hook

    handles = [
        layers[int(site.removeprefix("vision."))].register_forward_pre_hook(mark(number), with_kwargs=True)
        for number, site in enumerate(sites)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exported(
    model: torch.nn.Module, host: Host, sample: Mapping[str, Any], inputs: VisionInputs, sites: Sequence[str]
) -> tuple[torch.export.ExportedProgram, tuple[Mapping[int, Any], ...]]:
    """The vision path as a graph, and which axes of its inputs may vary."""
    module, arguments = VisionPath(model, host, sample, inputs), tuple(inputs.all.values())
    # Some encoders compute with the image's size in ways that only work for numbers: for them it stays as it is. So it
    # does where cuts follow each other inside the encoder: every one makes the expression of the length longer.
    whole = {name: dict.fromkeys(range(value.dim()), AUTO) for name, value in inputs.all.items()}
    first = tuple(axes if name in inputs.beside else {0: AUTO} for name, axes in whole.items())
    # Tiles, too, are of one size, and as many of them as the model has places for.
    every = first if len(sites) > 1 or images_of(inputs.all) else tuple(whole.values())
    if inputs.by_image:
        first = every = ({2: AUTO, 3: AUTO},)
    with tracing(model), _marked(model, sites):
        try:
            return functional(torch.export.export(module, arguments, dynamic_shapes=(every,), strict=False)), every
        except REFUSALS:
            return export("vision", module, arguments, (first,)), first


def _handed_on(exported: torch.export.ExportedProgram, sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the sample that the family's code put into the graph as they are."""
    lifted = [exported.constants[name] for name in _lifted(exported)]
    places = {value.data_ptr() for value in lifted if isinstance(value, torch.Tensor)}
    return {name: value for name, value in sample.items() if value.data_ptr() in places}


def capture_vision(
    model: torch.nn.Module, host: Host, sample: Mapping[str, Any], sites: Sequence[str] = ()
) -> Component:
    """The vision component of `model`; `sample` must hold at least two images, so that their number stays symbolic."""
    device = next(model.parameters()).device
    inputs = entry_inputs(host, sample)
    tensors = each_image_apart(inputs.tensors) if host.reads_across else inputs.tensors
    inputs = dataclasses.replace(inputs, tensors={name: value.to(device) for name, value in tensors.items()})
    exported, dynamic = _exported(model, host, sample, inputs, sites)
    beside = _handed_on(exported, sample)
    if beside and not inputs.by_image:
        inputs = dataclasses.replace(inputs, beside={name: value.to(device) for name, value in beside.items()})
        exported, dynamic = _exported(model, host, sample, inputs, sites)
    arguments = tuple(inputs.all.values())
    _refuse_constants(exported, arguments[0].shape[0])
    drop_checks(exported)
    count = len(exported.graph_signature.user_outputs)
    outputs = (OUTPUT, *(f"{OUTPUT}.{i}" for i in range(1, count)))
    words = {name: value for name, value in inputs.constants.items() if isinstance(value, (bool, int, float, str))}
    meta = {"by_image": inputs.by_image, "words": words}
    return Component("vision", exported, tuple(inputs.all), outputs, arguments, dynamic, meta=meta)
