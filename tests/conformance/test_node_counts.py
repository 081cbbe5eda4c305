"""No graph that ONNX Runtime opens grows with what a policy keeps: whatever is done again and again is one `Loop`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import matrix
import onnx
import pytest

import support
from tvc import api
from tvc.errors import ArgumentError
from tvc.policy import load_policy, presets
from tvc.report.budget import settings_at

SHARES = ("75%", "50%", "33%", "25%", "11%")
# Sums over sizes differ by a few nodes: three quarters of a length takes fewer than 112 thousandths. A loop that is
# unrolled takes several for each of the eight tokens and more that lie between two budgets.
OF_SIZES = 16
# Two settings of what no budget can be set of. Exits, positions and rotations keep no number of tokens.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aim": ({"keep": "45%"}, {"keep": "25%"}),  # two rounds of merging each
    "dycoke": ({"keep": "60%"}, {"keep": "30%"}),
    "evs": ({"keep": "60%"}, {"keep": "30%"}),
    "frame-stride": ({"every": 2}, {"every": 4}),
    "framefusion": ({"cost": "60%"}, {"cost": "30%"}),
    "pixel-shuffle": ({"side": 2}, {"side": 4}),
    "pool": ({"side": 2}, {"side": 4}),
    "pool-3d": ({"side": 2}, {"side": 4}),
    "prumerge": ({"keep": "25%"}, {"keep": "12.5%"}),
    "qtsplus": ({"most": 0.5}, {"most": 0.25}),
    "showui": ({"keep": "60%"}, {"keep": "30%"}),
    "stc": ({"keep": 9}, {"keep": 3}),
    "tokenflex": ({"side": 4}, {"side": 2}),
    "transprune": (
        {"keep": "75%", "keep_second": "60%", "keep_third": "50%"},
        {"keep": "60%", "keep_second": "50%", "keep_third": "30%"},
    ),
    "video-xl-2": ({"pooled": 2}, {"pooled": 4}),
    # A number of tokens and a share of them are computed in other ways.
    "visionzip": ({"keep": "50%", "contextual": "10%"}, {"keep": "12.5%", "contextual": "5%"}),
    "visual-context-window": ({"near": 1, "far": 2}, {"near": 2, "far": 4}),
}
WITHOUT = ("dyvte", "todre-exit", "v2pe", "vista-unrotated")


def nodes(graphs: Iterable[onnx.GraphProto]) -> int:
    """Of graphs and of all that loops and branches in them hold."""
    total = 0
    for graph in graphs:
        total += len(graph.node)
        total += nodes(a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    return total


def counted(preset: str, settings: dict[str, Any], folder: pathlib.Path) -> dict[str, int]:
    """Nodes of every graph of the preset's artifact, by its file."""
    prepared, _ = matrix.prepare("llava", "cpu", matrix.DEPTHS.get(preset))
    policy = load_policy(preset, matrix.SETTINGS.get(preset, ())).with_settings(settings)
    program, resolved = prepared.reduce(support.with_weights(policy, prepared.survey.layout, folder))
    compiled = api.finish(prepared.source, prepared.survey, resolved, program, "ort")
    assert compiled.files is not None
    files = sorted(pathlib.Path(compiled.files).rglob("*.onnx"))
    models = {file.stem: onnx.load(file, load_external_data=False) for file in files}
    return {name: nodes([model.graph, *model.functions]) for name, model in models.items()}


def two_budgets(preset: str) -> list[dict[str, Any]]:
    """Settings for the two shares furthest apart that the preset can meet on this model.

    A step that keeps everything computes no share, so these are left out.
    """
    if preset in PAIRS:
        return list(PAIRS[preset])
    prepared, _ = matrix.prepare("llava", "cpu", matrix.DEPTHS.get(preset))
    policy = load_policy(preset, matrix.SETTINGS.get(preset, ()))
    met = []
    for share in SHARES:
        try:
            settings = settings_at(policy, prepared.survey.layout, share)
        except ArgumentError:
            continue
        if "100%" not in settings.values():
            met.append(settings)
    return [met[0], met[-1]]


@pytest.mark.conformance
@pytest.mark.parametrize("preset", [name for name in presets() if name not in WITHOUT])
def test_no_graph_grows_with_the_budget(preset: str, tmp_path: pathlib.Path) -> None:
    more, fewer = two_budgets(preset)
    assert more != fewer
    many, few = counted(preset, more, tmp_path), counted(preset, fewer, tmp_path)
    assert many.keys() == few.keys()
    assert all(abs(many[name] - few[name]) <= OF_SIZES for name in many), f"{many} with {more}, {few} with {fewer}"
