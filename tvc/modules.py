"""The weights of a policy's primitives in an artifact: copied into it, and named there by its policies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tvc.errors import ArtifactError
from tvc.kernels.weights import SUFFIX, Trained
from tvc.policy import Policy, ResolvedPolicy
from tvc.policy.document import Document
from tvc.policy.document import Path as Place

FOLDER = "modules"


def carry(folder: Path, policy: ResolvedPolicy) -> tuple[Any, Any]:
    """Writes the weights that the graphs hold below `folder`; the policy as written and as resolved, naming them there.

    They are those that were compiled, whatever has become of their files since.
    """
    files: dict[Path, dict[str, torch.Tensor]] = {}
    for primitive in _trained(policy.policy):
        front = f"{primitive.prefix}." if primitive.prefix else ""
        held = files.setdefault(primitive.weights.path.resolve(), {})
        held.update({f"{front}{name}": value for name, value in primitive.weights.tensors(front).items()})
    names: dict[Path, str] = {}
    for path, tensors in files.items():
        stem, number = path.name.removesuffix(SUFFIX), 2
        name = f"{FOLDER}/{stem}{SUFFIX}"
        while name in names.values():
            name, number = f"{FOLDER}/{stem}-{number}{SUFFIX}", number + 1
        (folder / FOLDER).mkdir(exist_ok=True)
        safetensors.torch.save_file(tensors, folder / name)
        names[path] = name
    documents = policy.original.document, policy.policy.document
    written, decided = (_renamed(one, (), one.data, names) for one in documents)
    return written, decided


def _trained(policy: Policy) -> list[Trained]:
    return [p for step in policy.steps for p in step.primitives() if isinstance(p, Trained)]


def _renamed(document: Document, place: Place, value: Any, names: Mapping[Path, str]) -> Any:
    """The value with each file of weights under its name in the artifact."""
    if isinstance(value, dict):
        return {key: _renamed(document, (*place, key), inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(document, (*place, i), inner, names) for i, inner in enumerate(value)]
    if isinstance(value, str) and value.endswith(SUFFIX):
        return names.get((document.folder(place) / value).resolve(), value)
    return value


def check_carried(folder: Path, policy: ResolvedPolicy, listed: Mapping[str, Any]) -> None:
    """Refuses an artifact whose policies name weights that are none of its own files.

    Raises:
        ArtifactError: a policy names a file outside the artifact, or one that its manifest does not list.
    """
    for primitive in _trained(policy.policy):
        path = primitive.weights.path.resolve()
        inside = path.is_relative_to(folder.resolve())
        name = path.relative_to(folder.resolve()).as_posix() if inside else os.fspath(path)
        if not inside or name not in listed:
            raise ArtifactError(
                "a policy of the artifact names weights that are none of its files",
                where=os.fspath(folder),
                got=name,
                want=f"a file below {FOLDER}, listed in tvc.json",
                fix="compile the model again",
                slug="unsafe-path",
            )
