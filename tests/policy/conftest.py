"""Makes the helper modules of this folder importable by name."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
FORMULAS = ("select", "merge", "trained", "scenes", "video", "everywhere")

# Those that others import come first.
for name in ("policy_cases", "policy_formulas", *(f"policy_formulas_{group}" for group in FORMULAS), "preset_given"):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
