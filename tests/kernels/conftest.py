"""Makes the helper modules of this folder importable by name."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).parent

ORACLES = (
    "oracles",
    *(
        f"oracles_{group}"
        for group in (
            "folding",
            "encoder",
            "decoder",
            "pairs",
            "greedy",
            "frames",
            "windows",
            "recover",
            "modules",
            "scenes",
            "regions",
            "caches",
            "spectral",
        )
    ),
)

for name in (*ORACLES, "one_graph", "one_graph_settings", "provider_cases"):
    spec = importlib.util.spec_from_file_location(f"kernel_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"kernel_{name}"] = module
    spec.loader.exec_module(module)
