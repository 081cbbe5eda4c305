"""Makes `import matrix` work here: the script is also run by itself."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

_PATH = pathlib.Path(__file__).parent / "matrix.py"

if "matrix" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("matrix", _PATH)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["matrix"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["matrix"])
