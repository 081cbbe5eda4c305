"""Whatever a model is asked, every preset equals its definition; one of them by default, all by the script."""

from __future__ import annotations

import asked
import pytest


@pytest.mark.parametrize(
    ("family", "preset"), [("smolvlm", "fastv"), pytest.param("gemma3", "dart", marks=pytest.mark.conformance)]
)
def test_answers_are_those_of_the_definition(family: str, preset: str) -> None:
    cells = asked.cells_of(family, preset, "draft")
    assert [cell.asked for cell in cells] == list(asked.ASKED)
    assert {cell.outcome for cell in cells} == {"passed"}, cells
    assert sum(cell.comparisons for cell in cells) > 50


def test_cells_are_counted_by_family_and_by_what_was_asked() -> None:
    def cell(family: str, preset: str, name: str, outcome: str, what: str = "") -> asked.Cell:
        return asked.Cell(family, preset, name, outcome, what, "", 0.1, 7, 1.0)

    refused = [cell("blip-2", "tome", name, "refused", "illegal-site") for name in asked.ASKED]
    kept = [cell("blip-2", "fastv", "several", "passed"), cell("blip-2", "fastv", "none", "failed"), *refused]
    table = asked.summary(kept).splitlines()
    assert table[2] == "| blip-2 | 1 passed, 1 refused | 1 refused | 1 refused | 1 failed, 1 refused |"
    assert table[-1] == "6 cells, 42 comparisons. Refused: `illegal-site` 4."
