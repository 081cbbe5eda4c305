"""Every preset on every family and target equals its definition; a cross-section by default, all of it on request."""

from __future__ import annotations

import matrix
import pytest

import support
from tvc.policy import presets

CROSS_SECTION = (
    ("llava", "uniform", ("torch",)),
    pytest.param("llava", "visionzip", ("ort",), marks=pytest.mark.conformance),
    pytest.param("smolvlm", "pyramiddrop", ("torchscript",), marks=pytest.mark.conformance),
)


def _check(family: str, preset: str, targets: tuple[str, ...]) -> None:
    for cell in matrix.verify_cells(family, preset, targets):
        assert cell.outcome == "passed", f"{cell.target}: {cell.worst} > {cell.allowed} at {cell.output}"
        assert cell.comparisons > 20


@pytest.mark.parametrize(("family", "preset", "targets"), CROSS_SECTION)
def test_compiled_equals_definition(family: str, preset: str, targets: tuple[str, ...]) -> None:
    _check(family, preset, targets)


@pytest.mark.conformance
@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("family", list(support.FAMILIES))
def test_compiled_equals_definition_everywhere(family: str, preset: str) -> None:
    _check(family, preset, matrix.TARGETS)
