"""The selector `regions` as a graph: as many nodes whatever the picture and the budget, and few rounds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tvc.export.ort_operators import translations
from tvc.kernels import OPS
from tvc.kernels import select_regions as module
from tvc.kernels.grid import neighbours_by_columns
from tvc.kernels.op import Scope
from tvc.kernels.select_regions import Regions

AUTO = torch.export.Dim.AUTO


class Picture(torch.nn.Module):
    def __init__(self, keep: str, columns: int):
        super().__init__()
        self.rule, self.columns = Regions(keep=keep), columns

    def forward(self, pixels: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        beside = neighbours_by_columns(segment, counts, self.columns)
        chosen: torch.Tensor = self.rule.apply(None, Scope(segment, counts, 1), pixels, beside)
        return chosen


def lowered(keep: str, columns: int, tokens: int) -> torch.export.ExportedProgram:
    given = (torch.zeros(2, tokens, 3), torch.zeros(2, tokens, dtype=torch.int64), torch.full((2, 1), tokens))
    dynamic = ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO}, {0: AUTO})
    exported = torch.export.export(Picture(keep, columns), given, dynamic_shapes=dynamic, strict=False)
    draft = exported.module(check_guards=False)
    for node in draft.graph.nodes:
        if node.target is OPS["regions_keep"].overload:
            node.target = OPS["regions_keep"].lowering
    draft.recompile()
    return torch.export.export(draft, given, dynamic_shapes=dynamic, strict=False)


@pytest.mark.conformance
def test_a_graph_grows_neither_with_the_picture_nor_with_the_budget() -> None:
    counts = []
    for keep, columns, tokens in (("50%", 3, 12), ("12.5%", 40, 1600)):
        program = lowered(keep, columns, tokens)
        written = torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=translations())
        counts.append(Counter(node.op_type for node in written.model.graph))
    assert counts[0]["Loop"] == 1
    assert counts[0] == counts[1]


def winding(side: int) -> torch.Tensor:
    """[side, side] one region that goes through the whole picture from one end to the other."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (row % 2 == 0) | (column == torch.where(row % 4 == 1, side - 1, 0))


@pytest.mark.parametrize("side", [9, 33, 65])
def test_the_longest_way_takes_few_rounds(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def counted(body, state, most, unsettled):  # type: ignore[no-untyped-def]
        return repeat(lambda number, *now: (rounds.append(1), body(number, *now))[1], state, most, unsettled)

    repeat = module.repeat
    monkeypatch.setattr(module, "repeat", counted)
    tokens = side * side
    segment = torch.zeros(1, tokens, dtype=torch.int64)
    right, below = neighbours_by_columns(segment, torch.tensor([[tokens]]), side)
    shown = winding(side).flatten()
    together = [(other, (other >= 0) & (shown == shown[other.clamp(min=0)])) for other in (right, below)]
    label = module.regions(together)
    assert label.flatten()[shown].unique().tolist() == [0]
    assert len(rounds) <= 2 * tokens.bit_length()
