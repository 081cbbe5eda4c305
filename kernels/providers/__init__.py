"""Triton implementations of ops, one file an op: what runs when an op of `tvc.kernels` is given CUDA tensors.

A file `providers/<op>.py` holds kernels and two functions with the signature of the op's reference: `supports` says
whether these arguments can be served, and why not; `launch` serves them. Nothing else names it: its file name is the
registration. The reference stays the meaning; it runs on CUDA tensors too wherever `supports` says no, or triton is
not installed. Files are imported, and triton with them, when the first CUDA tensor arrives.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

PROVIDED = frozenset(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether a provider serves some arguments; `reason` says why it does not."""

    ok: bool
    reason: str = ""


YES = Support(True)


def no(reason: str) -> Support:
    return Support(False, reason)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def provider(name: str) -> Any:
    """The module that provides the op called `name`."""
    return importlib.import_module(f"{__name__}.{name}")


def support(name: str, *arguments: Any, **named: Any) -> Support:
    """Whether kernels serve these arguments of the op called `name`."""
    if name not in PROVIDED:
        return no("the op has no provider")
    if not _installed():
        return no("triton is not installed")
    found: Support = provider(name).supports(*arguments, **named)
    return found


def dispatched(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The op on CUDA tensors: its kernels where they serve the arguments, else the reference."""

    def run(*arguments: Any, **named: Any) -> Any:
        if not support(name, *arguments, **named).ok:
            return reference(*arguments, **named)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(next(value for value in arguments if isinstance(value, torch.Tensor))):
            return provider(name).launch(*arguments, **named)

    return run


__all__ = ["PROVIDED", "YES", "Support", "dispatched", "no", "provider", "support"]
