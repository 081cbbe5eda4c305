"""Makes `import support` work from every test folder, and keeps runs small and repeatable."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch

HERE = pathlib.Path(__file__).parent
LONG = ("test_lowering.py", "test_providers.py")  # of the kernels

# `python -m pytest` puts the repository root on the path, where `kernels` would be imported a second time.
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != HERE.parent]

# How long an example takes is the machine's business, not the code's.
hypothesis.settings.register_profile("tvc", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tvc")
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
    """Deselecting is the lane's job; a `gpu` test on a machine without one cannot say anything, so it is left out.

    Files are handed out in the order of collection: those of many short tests come last and fill the gaps.
    """
    items.sort(key=lambda item: item.path.parent.name in ("policy", "kernels") and item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    kept = [item for item in items if item.get_closest_marker("gpu") is None]
    if len(kept) != len(items):
        items[0].config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@dataclasses.dataclass
class Artifact:
    """A tiny model, its processor and what was compiled from it; the directory is written when first asked for."""

    model: Any
    processor: Any
    compiled: Any
    place: pathlib.Path

    @property
    def folder(self) -> pathlib.Path:
        if not self.place.exists():
            self.compiled.save_pretrained(self.place)
        return self.place


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """`artifacts(family, policy, target="torch", dtype=None, settings=())`: compiled once a session.

    Tests share what they get: nothing may be changed in place.
    """
    made: dict[tuple[Any, ...], Artifact] = {}

    def get(
        family: str, policy: str, target: str = "torch", dtype: str | None = None, settings: tuple[str, ...] = ()
    ) -> Artifact:
        import support
        import tvc

        key = (family, policy, target, dtype, settings)
        if key not in made:
            model, processor = support.build(family)
            loaded = tvc.load_policy(policy, set=settings)
            compiled = tvc.compile(model, loaded, target, verify=False, dtype=dtype, processor=processor)
            made[key] = Artifact(model, processor, compiled, tmp_path_factory.mktemp("artifact") / "out")
        return made[key]

    return get
