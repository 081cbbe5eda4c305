"""The public `verify`: opens what is to be compared, and compares it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from tvc.artifact import open_artifact
from tvc.model import CompiledModel
from tvc.trace.load import in_evaluation, load
from tvc.verification.check import STEPS, check
from tvc.verification.report import Report


def verify(
    artifact: str | os.PathLike[str] | CompiledModel,
    model: str | os.PathLike[str] | torch.nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    steps: int = STEPS,
    tolerance: float | None = None,
) -> Report:
    """Compares a compiled model with the untouched one, whose dropped tokens are masked from their layer on.

    Args:
        artifact: an artifact directory or a compiled model.
        model: hub id, directory or module that it was compiled from.
        inputs: what the processor returned for prompts with images; default: a picture made for the purpose.
        steps: tokens to generate; models beyond a billion parameters get two.
        tolerance: difference that is allowed, relative to the largest number; default: by the model's type.

    Returns:
        Every comparison: what each step kept, keys and values of every layer, logits of every generated token; for the
        batch as given, for one sample and for three samples of different lengths; where scores remember earlier calls,
        also for a later one of three samples, with what is remembered.

    Raises:
        VerificationError: they differ; it names the first output that does and carries the report.
        ArtifactError, ModelError: one of the two cannot be opened.
    """
    compiled = artifact if isinstance(artifact, CompiledModel) else open_artifact(artifact)
    source = load(model, device=compiled.device, dtype=compiled.dtype)
    with in_evaluation(source.model):
        return check(compiled, source.model, inputs, steps=steps, tolerance=tolerance)
