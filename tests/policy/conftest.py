"""Makes the table of mistakes importable by name."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

_spec = importlib.util.spec_from_file_location("policy_cases", pathlib.Path(__file__).parent / "policy_cases.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["policy_cases"] = _module
_spec.loader.exec_module(_module)
