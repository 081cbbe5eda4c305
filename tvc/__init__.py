"""tvc: compile a vision-language model with a declarative token-reduction policy.

import tvc
compiled = tvc.compile("llava-hf/llava-1.5-7b-hf", "fastv", target="ort")
ids = compiled.generate(**processor_outputs, max_new_tokens=32)
compiled.save_pretrained("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvc.api import compile, inspect, load, plan  # noqa: A004  the public names
    from tvc.checking import verify
    from tvc.errors import TvcError, VerificationError
    from tvc.policy import load_policy, presets  # type: ignore[no-redef]

__version__ = "0.1.0"
__all__ = [
    "TvcError",
    "VerificationError",
    "compile",
    "inspect",
    "load",
    "load_policy",
    "ops",
    "plan",
    "presets",
    "verify",
]

_HOMES = {
    "compile": "tvc.api",
    "inspect": "tvc.api",
    "load": "tvc.api",
    "plan": "tvc.api",
    "TvcError": "tvc.errors",
    "VerificationError": "tvc.errors",
    "load_policy": "tvc.policy",
    "presets": "tvc.policy",
    "verify": "tvc.checking",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import tvc` and the command line start at once."""
    if name == "ops":
        return importlib.import_module("tvc.kernels").PRIMITIVES
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tvc' has no attribute {name!r}")
