"""Ops and policy primitives, one file each; importing the package fills both registries."""

from __future__ import annotations

import importlib
import pkgutil

from tvc.kernels.op import OPS, PRIMITIVES

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OPS", "PRIMITIVES"]
