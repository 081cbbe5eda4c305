"""The one door to `transformers.exporters`, whose parts used here are private and pinned in pyproject.toml.

What upstream gives: reversible patches that make HF modelling code traceable, input preparers that compute
data-dependent tensors (window order, packed-sequence boundaries, vision positions) outside the graph, and a table of
ONNX translations. What upstream breaks, and is therefore not used: `export_for_generation` (forgets LLaVA's vision
path, drops an all-ones attention mask, ties the past lengths of all layers to one symbol) and the packed-attention
patch (requires equally long segments).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers.exporters.exporter_dynamo  # noqa: F401  fills the patch registry
from transformers.exporters import utils as _utils

# Attention is traced through `tvc.trace.attention`, which needs neither of these.
_UNWANTED = ("_patch_chunked_vision_attention", "_patch_sdpa")

_EXPERTS = "_experts_implementation_internal"


@contextlib.contextmanager
def tracing_patches(backend: str = "dynamo") -> Iterator[None]:
    """Makes HF modelling code traceable for the duration of the block."""
    kept = [entry for entry in _utils._PATCHES.get(backend, []) if entry[2].__name__ not in _UNWANTED]
    resolved = [(owner, *rest) for place, *rest in kept if (owner := _owner(place)) is not None]
    with _utils.patch_attributes(resolved):
        yield


def _owner(place: Any) -> Any:
    """The object that a patch belongs to: older releases hold the object, newer ones its dotted path."""
    return _utils.import_dotted_path(place, missing_ok=True) if isinstance(place, str) else place


@contextlib.contextmanager
def any_experts(model: torch.nn.Module) -> Iterator[None]:
    """Mixtures of experts run in a form that needs no weights of a certain type (nor any: the meta device)."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), _EXPERTS)}
    before = {key: getattr(config, _EXPERTS) for key, config in configs.items()}
    for config in configs.values():
        setattr(config, _EXPERTS, "batched_mm")
    try:
        yield
    finally:
        for key, config in configs.items():
            setattr(config, _EXPERTS, before[key])


def prepare_vision_inputs(tower: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The tower's keyword inputs plus the data-dependent tensors that its forward would compute by itself."""
    prepared = dict(inputs)
    _utils.precompute_export_inputs(tower, prepared)
    return prepared


def onnx_translation_table() -> dict[Any, Any]:
    """ONNX translations of operators that `torch.onnx` lacks."""
    from transformers.exporters import exporter_onnx

    return dict(exporter_onnx._ONNX_TRANSLATION_TABLE)
