"""Target `ort`: one ONNX graph a component, one shared weight file, run by stock ONNX Runtime.

Files: `vision.onnx`, `embed.onnx`, `decoder.onnx`, `projector.onnx` where the policy reduces after the projector, and
`model.onnx_data`. Inputs and outputs carry the components' names, dynamic sizes speaking names (`batch`, `chunk`,
`past_0`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as native

from tvc.errors import ArgumentError, ArtifactError, ExportError, InputError
from tvc.export import ort_attention, ort_graph, ort_weights
from tvc.export.base import DEFAULTS, Options, ordered, register
from tvc.program import Component, Program

MAXIMUM_OPSET = 26  # ONNX Runtime 1.31 refuses 27
_FLOATS = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
}
_REFUSALS = (
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
    native.EPFail,
    RuntimeError,  # what a run with bound inputs raises
)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of packages that nobody asked for, through logging and warnings."""
    logger = logging.getLogger("torch.onnx")
    level, logger.level = logger.level, logging.ERROR
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def sizes(component: Component, program: Program) -> dict[str, dict[int, str]]:
    """Names for the dynamic axes of a component's inputs."""
    stage = {layer: part.index for part in program.stages for layer in part.layers}
    plain = {"text_index": "text", "visual_index": "visual", "visual_segment": "visual", "visual_counts": "images"}
    named: dict[str, dict[int, str]] = {}
    for name, tensor in zip(component.inputs, component.sample, strict=True):
        kind, _, index = name.partition(".")
        if kind in ("past_key_positions", "past_visual", "past_seen", "past_chosen"):
            named[name] = {0: "batch", 1: f"past_{index}"}
        elif kind in ("past_key", "past_value"):
            named[name] = {0: "batch", 2: f"past_{stage.get(int(index), 0)}"}
        elif kind == "past_memory":
            named[name] = {0: "batch"}
        elif kind in plain:
            named[name] = {0: "batch", 1: plain[kind]}
        elif kind in ("inputs_embeds", "query_positions", "position_ids", "input_ids"):
            first = tensor.dim() - 2 if kind == "position_ids" else 0
            named[name] = {first: "batch", first + 1: "chunk"}
    return named


def convert(component: Component, program: Program, options: Options) -> tuple[ir.Model, dict[str, int]]:
    """The ONNX model of one component (weights still those of the program) and how often each fusion matched.

    Raises:
        ExportError: An operator has no ONNX counterpart.
    """
    from tvc.export.ort_operators import translations

    exported, counts = ort_attention.fuse(component.exported)
    try:
        with _quiet(), torch.no_grad():
            made: Any = torch.onnx.export(
                exported,
                component.sample,
                input_names=list(component.inputs),
                output_names=list(component.outputs),
                opset_version=options.opset,
                custom_translation_table=translations(),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            counts["linear"] = ort_graph.keep_weight_layout(made.model)
            made.optimize()
    except (torch.onnx.errors.OnnxExporterError, torch.onnx.OnnxExporterError) as error:
        raise _refused(component.name, error) from error
    model = made.model
    ort_graph.widen_rotation_tables(model)
    counts["residual_norm"] = ort_graph.join_residual_norms(model)
    ort_graph.name_sizes(model, sizes(component, program))
    ort_graph.forget_origin(model)
    model.graph.name = component.name
    return model, counts


def _refused(name: str, error: Exception) -> ExportError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ExportError(
        "an operator has no ONNX counterpart",
        where=f"component {name}",
        got=str(cause).splitlines()[0],
        want="operators that torch.onnx or tvc.export.ort_operators can translate",
        fix="add its translation to tvc/export/ort_operators.py, or choose the target torch",
    )


def _to_runtime(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    """The tensor's memory as a value of the runtime, which knows booleans by their bytes only."""
    if tensor.dtype == torch.bool:
        return onnxruntime.OrtValue(native.OrtValue.from_dlpack(tensor.view(torch.uint8).__dlpack__(), True))
    return onnxruntime.OrtValue.from_dlpack(tensor)


def _to_torch(value: onnxruntime.OrtValue) -> torch.Tensor:
    """The value's memory as a tensor."""
    tensor = torch.from_dlpack(value)
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor


class OrtRunner:
    """Runs components in sessions that are opened when first needed; outputs are the memory of the runtime."""

    def __init__(
        self, folder: Path, names: Mapping[str, Mapping[str, list[str]]], device: torch.device, options: Options
    ):
        self.folder, self.names, self.device, self.options = folder, names, device, options
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def session(self, component: str) -> onnxruntime.InferenceSession:
        """The session of a component.

        Raises:
            ArtifactError: ONNX Runtime cannot read the graph.
        """
        if component not in self._sessions:
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads, settings.log_severity_level = self.options.threads, 3
            if self.options.profile:
                settings.enable_profiling, settings.profile_file_prefix = True, f"{self.options.profile}-{component}"
            path = self.folder / f"{component}.onnx"
            try:
                self._sessions[component] = onnxruntime.InferenceSession(
                    str(path), settings, providers=self._providers()
                )
            except _REFUSALS as error:
                raise ArtifactError(
                    "ONNX Runtime cannot open a graph of the artifact",
                    where=str(path),
                    got=str(error).splitlines()[0],
                    want=f"a graph that onnxruntime {onnxruntime.__version__} runs",
                    fix="compile the artifact again with the installed onnxruntime; for a CPU, in float32 or float16",
                ) from error
        return self._sessions[component]

    def _providers(self) -> list[Any]:
        if self.device.type == "cuda":
            return [("CUDAExecutionProvider", {"device_id": self.device.index or 0}), "CPUExecutionProvider"]
        return ["CPUExecutionProvider"]

    def __call__(self, component: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names, session = self.names[component], self.session(component)
        taken, binding = {value.name: value.type for value in session.get_inputs()}, session.io_binding()
        tensors = ordered(component, names["inputs"], inputs)
        for name, tensor in zip(names["inputs"], tensors, strict=True):
            if name in taken:
                # As models do with their pixels: a processor writes float32 whatever the model computes in.
                kind = _FLOATS.get(taken[name], tensor.dtype) if tensor.is_floating_point() else tensor.dtype
                plain = tensor.detach().to(self.device, kind).contiguous()
                binding.bind_ortvalue_input(name, _to_runtime(plain))
        for name in names["outputs"]:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        try:
            session.run_with_iobinding(binding)
        except _REFUSALS as error:
            raise self._failed(component, names["inputs"], tensors, error) from error
        return {name: _to_torch(value) for name, value in zip(names["outputs"], binding.get_outputs(), strict=True)}

    def _failed(self, component: str, names: list[str], tensors: list[torch.Tensor], error: Exception) -> InputError:
        given = ", ".join(
            f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in zip(names[:8], tensors, strict=False)
        )
        wanted = ", ".join(
            f"{value.name} {value.shape} {value.type}" for value in self.session(component).get_inputs()[:8]
        )
        return InputError(
            f"ONNX Runtime refused the inputs of {component}: {str(error).splitlines()[0]}",
            where=component,
            got=given,
            want=wanted,
            fix="give tensors of these shapes and types",
        )


class Ort:
    """The target's two halves."""

    name = "ort"
    keeps = frozenset({"attention"})

    def write(self, program: Program, folder: Path, options: Options = DEFAULTS) -> list[Path]:
        if options.opset > MAXIMUM_OPSET or options.opset < 23:
            raise ArgumentError(
                "this ONNX opset cannot be written",
                where="opset",
                got=options.opset,
                want=f"23 to {MAXIMUM_OPSET}",
                fix="leave the opset at 23",
                slug="bad-opset",
            )
        models = {}
        for name, component in program.components.items():
            models[name], component.meta["fusions"] = convert(component, program, options)
        return ort_weights.save(models, folder)

    def open(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        device: torch.device | str | None = None,
        options: Options = DEFAULTS,
    ) -> OrtRunner:
        place = torch.device(device or "cpu")
        if place.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ArgumentError(
                "the installed ONNX Runtime has no CUDA provider",
                where="device",
                got=str(place),
                want=", ".join(onnxruntime.get_available_providers()),
                fix="install onnxruntime-gpu, or use device cpu",
            )
        return OrtRunner(Path(folder), manifest["components"], place, options)


register(Ort())
