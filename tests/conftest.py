"""Makes `import support` work from every test folder, and keeps runs small and repeatable."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _register(name: str, path: pathlib.Path) -> None:
    """Loads one file as a top-level module.

    The folder itself must stay off `sys.path`: `tests/kernels` would pass for the package that transformers probes for.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_register("support", HERE / "support.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deselecting is the lane's job; a `gpu` test on a machine without one cannot say anything, so it is left out."""
    if torch.cuda.is_available():
        return
    kept = [item for item in items if item.get_closest_marker("gpu") is None]
    if len(kept) != len(items):
        items[0].config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
