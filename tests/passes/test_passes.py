"""What a pass promises: its order, its evidence, and a graph in which everything behind a cut is shorter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tvc import compiler
from tvc.chunks import mark_type
from tvc.errors import PassError, SiteError
from tvc.graphs import find_blocks, identifier
from tvc.kernels.op import OPS
from tvc.passes.base import Pass
from tvc.passes.insert_reductions import InsertReductions
from tvc.passes.lower_ops import LowerOps
from tvc.passes.rebind_cuts import RebindCuts
from tvc.passes.reselect_keys import ReselectKeys
from tvc.passes.retrace import Retrace
from tvc.passes.text_only import without_cuts
from tvc.program import Change, Program

FASTV = {
    "version": 1,
    "name": "one-cut",
    "steps": [
        {
            "at": "language.2",
            "score": {"attention": {"of": "last", "layer": "previous"}},
            "select": {"top": {"keep": "50%"}},
            "rest": "drop",
        }
    ],
}


@pytest.fixture(scope="module")
def inserted(traced: Callable[[str], Any]) -> Program:
    given = traced("llava")
    return InsertReductions(given.resolved(FASTV))(given.program)


@pytest.fixture(scope="module")
def reduced(inserted: Program) -> Program:
    return Retrace()(RebindCuts()(inserted))


def test_a_pass_out_of_order_is_refused(traced: Callable[[str], Any]) -> None:
    with pytest.raises(PassError, match="reductions-inserted"):
        RebindCuts()(traced("llava").program)
    with pytest.raises(PassError, match="cuts-rebound"):
        LowerOps()(traced("llava").program)


def test_a_pass_that_changes_nothing_has_failed(traced: Callable[[str], Any]) -> None:
    class Idle(Pass):
        def run(self, program: Program) -> list[Change]:
            return []

    with pytest.raises(PassError, match="found nothing to do"):
        Idle()(traced("llava").program)


def test_the_passes_of_the_compiler_stand_in_an_order_that_works() -> None:
    facts: frozenset[str] = frozenset({"traced"})
    for made in (InsertReductions, RebindCuts, ReselectKeys, Retrace, LowerOps):
        assert made.needs <= facts
        facts = (facts - made.ends) | made.gives


def test_a_pass_leaves_its_input_as_it_was(traced: Callable[[str], Any], inserted: Program) -> None:
    given = traced("llava").program
    assert given.components["decoder"].draft is None
    assert given.history == []
    assert inserted.components["decoder"].draft is not None
    assert "past_key_positions.1" not in given.components["decoder"].inputs


def test_evidence_names_what_was_cut_and_what_was_rebound(reduced: Program) -> None:
    history = dict(reduced.history)
    assert [change.what for change in history["InsertReductions"]] == ["reduction before block language.2"]
    assert all("one-cut" in change.why or "steps" in change.why for change in history["InsertReductions"])
    rebound = [change.node for change in history["RebindCuts"]]
    assert any("attention_mask" in name for name in rebound)
    assert len(rebound) >= 4  # hidden states, two rotary tables, the mask, the size


def test_text_says_who_added_what(reduced: Program) -> None:
    lines = reduced.text("decoder").splitlines()
    assert any("top_keep" in line and "added by InsertReductions" in line for line in lines)
    assert any("attention_mask" in line and "added by RebindCuts" in line for line in lines)
    plain = [line for line in lines if "layers_5_mlp_down_proj" in line]
    assert plain
    assert not any("added by" in line for line in plain)


def test_layers_behind_the_cut_are_shorter_symbolically(reduced: Program) -> None:
    component = reduced.components["decoder"]
    outputs = list(component.exported.graph.nodes)[-1].args[0]
    shapes = {name: node.meta["val"].shape for name, node in zip(component.outputs, outputs, strict=True)}
    sizes = {n.name: n.meta["val"].shape for n in component.exported.graph.nodes if n.op == "placeholder"}
    chunk, visual = str(sizes["inputs_embeds"][1]), str(sizes["visual_index"][1])
    assert chunk in str(shapes["key.1"][2])
    assert chunk not in str(shapes["key.2"][2])
    assert f"{visual}//2" in str(shapes["key.2"][2])
    assert [stage.layers for stage in reduced.stages] == [range(2), range(2, 6)]


@pytest.mark.parametrize(
    ("rule", "marks"),
    [
        ({}, ["visual.1", "seen.1"]),
        ({"unless_alike": 0.9, "bug_compatible": True}, ["visual.1", "seen.1"]),
        ({"unless_alike": 0.9}, ["visual.1", "seen.1", "chosen.1"]),
    ],
)
def test_layers_from_a_reselection_on_share_a_mask_of_their_own(
    traced: Callable[[str], Any], rule: dict[str, Any], marks: list[str]
) -> None:
    given = traced("llava")
    resolved = given.resolved({**FASTV, "reselect": {"at": "language.4", "keep": "30%", **rule}})
    cut = RebindCuts()(InsertReductions(resolved)(given.program))
    before = [block.attention.args[3].name for block in find_blocks(cut.components["decoder"].graph)]
    program = ReselectKeys(resolved.reselect)(cut)
    decoder = program.components["decoder"]
    masks = [block.attention.args[3] for block in find_blocks(decoder.graph)]
    assert [mask.name for mask in masks[:4]] == before[:4]
    assert masks[4] is masks[5]
    assert masks[4].target is masks[3].target
    assert masks[4].args[0] is masks[3].args[0]
    (change,) = program.history[-1][1]
    assert change.node == before[4]
    assert decoder.outputs[-3:] == ("visual.1", "seen.1", "chosen.1")
    names = [f"past_{mark}" for mark in marks]
    assert [name for name in decoder.inputs if mark_type(name) is not None] == names
    placeholders = [str(node.target) for node in decoder.graph.find_nodes(op="placeholder")]
    assert placeholders == [identifier(name) for name in decoder.inputs]


def test_what_scores_remember_enters_and_leaves_the_decoder(traced: Callable[[str], Any]) -> None:
    """Two steps with a memory and one without; a chunk of text hands on what it was given."""
    given = traced("llava")
    score = {"novelty": {"memory": "conversation"}}
    listed = [{**score, "weight": 1.0}, {"norm": {}, "weight": 1.0}, {**score, "weight": 2.0}]
    steps = [{"at": "language.1", "score": listed, "select": {"top": "50%"}}, *FASTV["steps"]]
    resolved = given.resolved({"version": 1, "steps": steps})
    program = RebindCuts()(InsertReductions(resolved)(given.program))
    decoder = program.components["decoder"]
    names = [f"memory.language.1.{term}.{state}" for term in (0, 2) for state in ("total", "frames")]
    assert [name for name in decoder.inputs if "memory" in name] == [f"past_{name}" for name in names]
    assert list(decoder.outputs[-4:]) == names
    sizes = {memory.name.removeprefix("past_"): memory.sizes for memory in decoder.meta["shape"].memories}
    assert sizes == {name: (64,) if name.endswith("total") else () for name in names}
    assert not given.program.components["decoder"].meta["shape"].memories
    placeholders = [str(node.target) for node in decoder.graph.find_nodes(op="placeholder")]
    assert placeholders == [identifier(name) for name in decoder.inputs]
    text = without_cuts(decoder.draft).graph
    passed = list(text.nodes)[-1].args[0][-4:]
    assert [node.target for node in passed] == [identifier(f"past_{name}") for name in names]


def test_positions_are_recomputed_not_gathered(reduced: Program) -> None:
    """Runtimes fuse rotary tables and masks that are computed from positions."""
    targets = [node.target for node in reduced.components["decoder"].exported.graph.nodes]
    assert targets.count(torch.ops.aten.cos.default) == 2
    assert targets.count(torch.ops.tvc.attention_mask.default) == 2


def test_lowering_leaves_no_op_but_those_kept(reduced: Program) -> None:
    names = {op.overload: name for name, op in OPS.items()}
    lowered = LowerOps({"attention"})(reduced)
    left = {names.get(n.target) for n in lowered.components["decoder"].exported.graph.nodes} - {None}
    assert left == {"attention"}
    everything = compiler.lower(reduced, "torchscript", lambda _line: None)
    for component in everything.components.values():
        assert not [n for n in component.exported.graph.nodes if n.target in names]


def test_a_program_is_lowered_for_one_target_after_another(traced: Callable[[str], Any]) -> None:
    given = traced("llava")
    program = RebindCuts()(InsertReductions(given.resolved(FASTV))(given.program))
    LowerOps()(program)
    kept = LowerOps({"attention"})(program).components["decoder"].exported.graph
    assert [node.target for node in kept.nodes].count(OPS["attention"].overload) == 6


def test_hidden_states_of_another_layer_are_refused(traced: Callable[[str], Any]) -> None:
    given = traced("llava")
    policy = {
        "version": 1,
        "name": "elsewhere",
        "steps": [
            {
                "at": "language.3",
                "score": {"norm": {"of": "feature", "layer": "language.1"}},
                "select": {"top": {"keep": "50%"}},
                "rest": "drop",
            }
        ],
    }
    with pytest.raises(SiteError, match="hidden states of another layer"):
        InsertReductions(given.resolved(policy))(given.program)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_5_vl", "4 neighbouring encoder tokens are joined into one visual token"),
        ("smolvlm", "4 neighbouring encoder tokens are joined into one visual token"),
        ("llava_onevision", "stitched into one grid behind the projector"),
    ],
)
def test_a_cut_inside_an_encoder_whose_grid_is_needed_later_is_refused(
    traced: Callable[[str], Any], family: str, reason: str
) -> None:
    policy = {
        "version": 1,
        "name": "inside",
        "steps": [{"at": "vision.1", "select": {"stride": {"keep": "50%"}}, "rest": "drop"}],
    }
    with pytest.raises(SiteError, match=reason):
        traced(family).resolved(policy)


def test_sites_of_a_traced_model(traced: Callable[[str], Any]) -> None:
    layout = traced("llava").program.layout
    assert layout.site("vision.2").legal
    assert not layout.site("vision.3").legal  # features are taken before the last block
    assert layout.site("projector").legal
    assert all(layout.site(f"language.{k}").legal for k in range(6))
    assert layout.site("language.6") is None
