"""Makes `import matrix` and its neighbours work here: the scripts are also run by themselves."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).parent

for _name in (
    "matrix",
    "random_inputs",
    "random_models",
    "random_cases",
    "random_report",
    "random_bench",
    "random_sweep",
    "asked",
):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, HERE / f"{_name}.py")
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])
