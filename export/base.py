"""What a target is: it writes a program's components into a folder and opens them again as a runner.

A target is one module of this package that calls `register`; nothing else names it. Modules are imported only when the
table is first read, so that a missing runtime hurts nobody who does not use it.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from tvc.errors import ArgumentError, ExportError, InputError
from tvc.program import Program


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller may ask of a writer or of a runner; a target ignores what it has no use for.

    Attributes:
        threads: Threads of one operator in ONNX Runtime; 0 leaves the choice to it.
        opset: Version of the ONNX operators.
        profile: Prefix of a profile file of ONNX Runtime; empty for none.
    """

    threads: int = 0
    opset: int = 23
    profile: str = ""


DEFAULTS = Options()


class Runner(Protocol):
    """Runs one component: tensors by name in, tensors by name out, on the device that the runner was opened for."""

    def __call__(self, component: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


class Target(Protocol):
    """One kind of artifact."""

    name: str
    keeps: frozenset[str]  # ops (names in `tvc.kernels`) that reach `write` whole; all others come as aten

    def write(self, program: Program, folder: Path, options: Options) -> list[Path]:
        """Writes every component below `folder` (which exists) and returns the files made.

        Raises:
            ExportError: An operator of the program has no counterpart in the target.
        """
        ...

    def open(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        device: torch.device | str | None = None,
        options: Options = DEFAULTS,
    ) -> Runner:
        """Opens what `write` made; `manifest` is the checked content of tvc.json (`manifest.read`).

        Raises:
            ArtifactError: A graph file cannot be read by the runtime.
        """
        ...


_TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Makes a target known under its name; a second one of that name is an error of whoever wrote it."""
    if target.name in _TARGETS:
        raise ExportError(
            f"two targets are called {target.name}",
            where=f"tvc.export, {type(target).__module__}",
            got=target.name,
            want="one target a name",
            fix="rename one of them",
        )
    _TARGETS[target.name] = target
    return target


def targets() -> dict[str, Target]:
    """Every target by name, found by walking the package."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_TARGETS.items()))


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
        ArgumentError: There is none.
    """
    known = targets()
    if name not in known:
        raise ArgumentError(
            "there is no such target",
            where="target",
            got=name,
            want=f"one of {', '.join(known)}",
            fix="choose one of these",
            slug="unknown-target",
        )
    return known[name]


def interface(program: Program) -> dict[str, dict[str, list[str]]]:
    """The names that a runner needs, for the manifest: `{component: {"inputs": [...], "outputs": [...]}}`."""
    return {
        name: {"inputs": list(part.inputs), "outputs": list(part.outputs)} for name, part in program.components.items()
    }


def ordered(component: str, names: list[str], inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in the order of `names`.

    Raises:
        InputError: One is missing.
    """
    missing = [name for name in names if name not in inputs]
    if missing:
        raise InputError(
            f"the component {component} lacks an input",
            where=f"{component}.{missing[0]}",
            got=", ".join(sorted(inputs)) or "nothing",
            want=", ".join(missing),
            fix="give every input that the manifest lists for this component",
            slug="missing-input",
        )
    return [inputs[name] for name in names]
