"""Loads what the user names: a directory, a hub id or a module that is already in memory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tvc.errors import ModelError
from tvc.trace.layout import meta_model
from tvc.trace.parts import decoder_weight
from tvc.trace.processor import load_processor


@dataclasses.dataclass
class Source:
    """A model and where it came from; `model` is None where only its configuration was wanted."""

    model: torch.nn.Module | None
    meta: torch.nn.Module  # the same class on the meta device, free to be changed
    processor: Any | None
    name: str
    revision: str | None
    folder: Path | None  # the directory it was loaded from, if it was one


def load(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    weights: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    processor: Any = None,
) -> Source:
    """The model with its weights (unless `weights` is False), a meta copy and its processor where there is one.

    Raises:
        ModelError: nothing can be loaded there, or it is not a vision-language model.
    """
    if isinstance(model, torch.nn.Module):
        return _in_memory(model, device, dtype, processor)
    name = os.fspath(model)
    meta = meta_model(name)
    _check_kind(meta, name)
    real = None
    if weights:
        options: dict[str, Any] = {"dtype": dtype if dtype is not None else "auto"}
        if device is not None:
            options["device_map"] = {"": str(device)} if str(device) != "cpu" else None
        try:
            real = AutoModelForImageTextToText.from_pretrained(name, **{k: v for k, v in options.items() if v}).eval()
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
            raise ModelError(
                "the model's weights cannot be loaded",
                where=name,
                got=f"{type(problem).__name__}: {problem}",
                want="a directory or hub id that AutoModelForImageTextToText loads",
                fix="check the path, or download the model first",
                slug="no-weights",
            ) from problem
        of_type(meta, decoder_weight(real).dtype)
    try:
        processor = processor or load_processor(name)
    except ModelError:
        processor = None
    folder = Path(name) if Path(name).is_dir() else None
    return Source(real, meta, processor, name, getattr(meta.config, "_commit_hash", None), folder)


def _in_memory(model: torch.nn.Module, device: Any, dtype: Any, processor: Any) -> Source:
    _check_kind(model, type(model).__name__)
    if dtype is not None or device is not None:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if (wanted is not None and wanted != decoder_weight(model).dtype) or device is not None:
            model = copy.deepcopy(model).to(device=device, dtype=wanted)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Source(model, meta_copy(model), processor, name, getattr(model.config, "_commit_hash", None), None)


@contextlib.contextmanager
def in_evaluation(model: torch.nn.Module | None) -> Iterator[None]:
    """`model` without dropout for the duration of the block; every module's own mode comes back afterwards."""
    if model is None:
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def meta_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the same class and configuration without weights."""
    with torch.device("meta"):
        made = type(model)._from_config(copy.deepcopy(model.config)).eval()  # type: ignore[attr-defined]
    return of_type(made, decoder_weight(model).dtype)


def of_type(meta: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`meta` in the type of the weights, which the configuration need not say: family code casts pixels to it."""
    return meta.to(dtype=dtype)


def _check_kind(model: torch.nn.Module, name: str) -> None:
    config = getattr(model, "config", None)
    if config is None or not (
        hasattr(model, "get_image_features") or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        raise ModelError(
            "this is not a vision-language model",
            where=name,
            got=type(model).__name__,
            want="a model of AutoModelForImageTextToText",
            fix="pass a vision-language model; a text-only model has no visual tokens to reduce",
            slug="not-a-vlm",
        )


def saved_configuration(folder: Path) -> tuple[PreTrainedConfig, GenerationConfig]:
    """The configurations in an artifact directory.

    Raises:
        OSError, ValueError, KeyError: they are missing, or of a model type that this transformers does not know.
    """
    return AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
