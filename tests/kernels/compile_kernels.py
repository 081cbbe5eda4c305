"""Compiles every kernel that the providers launch for one GPU architecture, on any machine, and prints a line each.

    python tests/kernels/compile_kernels.py 90

A stand-in for the driver says which GPU there is; launches stop once their kernel is compiled, so that what providers
return is not looked at. `test_providers.py` runs this file.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tvc.kernels.providers import PROVIDED, provider, support

SIZES = (63, 577, 2880)


class Stand:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    warnings.simplefilter("ignore")
    driver.set_active(Stand(int(sys.argv[1])))
    seen: set[str] = set()

    def compiled_alone(self: JITFunction, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            made = self.run(*arguments, grid=grid, warmup=True, **named)
            if made.hash not in seen:
                seen.add(made.hash)
                print(self.__name__, made.metadata.shared, made.metadata.num_warps, flush=True)
            return made

        return launch

    JITFunction.__getitem__ = compiled_alone
    # What no kernel wrote is no index out of range.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    cases = _cases()
    for name in sorted(PROVIDED):
        for dtype in (torch.bfloat16, torch.float32):
            for _, arguments in cases.sized(cases.EXTRA[name](SIZES)):
                given = [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
                if support(name, *given).ok:
                    provider(name).launch(*given)


def _cases() -> Any:
    """The file beside this one: with PYTHONSAFEPATH the folder of a script is not searched."""
    path = pathlib.Path(__file__).with_name("provider_cases.py")
    spec = importlib.util.spec_from_file_location("provider_cases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
