"""FuseAttention on the CPU: what a CUDA device would run, with the references of its ops in the place of kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import tvc
from support import build, inputs
from tvc import compiler
from tvc.kernels import OPS
from tvc.kernels.providers import PROVIDED
from tvc.policy import load_policy


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Targets keep every op that has kernels, as on CUDA; the evidence of the pass is collected."""
    monkeypatch.setattr(compiler, "kept", lambda target, device: PROVIDED)
    monkeypatch.setattr(compiler, "called", lambda module, kernels: module)  # ops are seen where they are dispatched
    evidence: list[Any] = []
    run = compiler.run

    def watched(program: Any, passes: Any, progress: Any) -> Any:
        made = run(program, passes, progress)
        evidence.extend(change for name, changes in made.history if name == "FuseAttention" for change in changes)
        return made

    monkeypatch.setattr(compiler, "run", watched)
    return evidence


def test_a_fused_decoder_equals_the_untouched_model(fused: list[Any]) -> None:
    model, _ = build("llava")
    compiled = tvc.compile(model, load_policy("fastv"), inputs=inputs("llava", 2), verify=False)
    assert Counter(change.what for change in fused) == {"attends by positions": 6, "scores by positions": 1}
    assert tvc.verify(compiled, model, inputs("llava", 3)).passed
    _check_runs(compiled)


def _check_runs(compiled: Any) -> None:
    """They hold the sizes and pads of each call, not those of the trace: kernels read and write where runs say."""
    seen = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.tvc.attend.default:
                seen.append((args[4], args[5]))
            return op(*args, **(kwargs or {}))

    for batch in (1, 3):
        with Watching():
            compiled(**inputs("llava", batch))
    assert {len(places) for places, _ in seen} == {1, 3}
    for places, runs in seen:
        length, starts = places.shape[1], []
        for sample, row in enumerate(places.tolist()):
            starts += [sample * length, sample * length + sum(place < 0 for place in row)]
        assert runs.tolist() == [*starts, places.numel()]
        assert runs.dtype == torch.int32


@pytest.mark.conformance
def test_steps_that_choose_their_keys_attend_by_positions(fused: list[Any]) -> None:
    model, _ = build("llava")
    rule = {"at": "language.3", "keep": "30%", "unless_alike": 0.9}
    compiled = tvc.compile(model, {"version": 1, "reselect": rule}, inputs=inputs("llava", 2), verify=False)
    assert Counter(change.what for change in fused) == {"attends by positions": 6, "scores by positions": 1}
    assert tvc.verify(compiled, model, inputs("llava", 3)).passed
    _check_runs(compiled)


@pytest.mark.conformance
def test_what_does_not_fit_stays_and_says_why(fused: list[Any]) -> None:
    model, _ = build("gemma3")
    tvc.compile(model, load_policy("fastv"), inputs=inputs("gemma3", 2), verify=False)
    assert {change.what for change in fused} == {"left as it is"}
    assert {change.why for change in fused} == {
        "its window of 24 tokens counts dropped tokens too",
        "tokens of a span attend in both directions",
    }


@pytest.mark.conformance
def test_chunks_of_frames_keep_their_masks(fused: list[Any]) -> None:
    model, _ = build("llava")
    policy = load_policy("video-xl-2", ["chunk=1", "previous=0", "best=1"])
    compiled = tvc.compile(model, policy, inputs=inputs("llava", 2), verify=False)
    assert {change.why for change in fused} == {"visual tokens see those of some chunks alone"}
    assert tvc.verify(compiled, model, inputs("llava", 2, images=4), steps=3).passed


def test_rows_of_a_chunk_on_top_of_a_past_see_the_past() -> None:
    """A later turn: fewer queries than keys, both padded."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    places = torch.tensor([[-1, 0, 4, 5, 8, 9, 10], [0, 1, 2, 3, -1, 9, 10]])
    mask = torch.ops.tvc.attention_mask(places[:, -3:], places, 0)
    got = torch.ops.tvc.attend(query, key, value, places[:, -3:], places, None, 0.3)
    want = OPS["attention"].reference(query, key, value, mask, 0.3, 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


class _Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of all that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(op)] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "preset", "overrides"),
    [
        ("llava", "fastv", ["positions=renumber"]),
        pytest.param("qwen2_5_vl", "pyramiddrop", [], marks=pytest.mark.conformance),
        pytest.param("gemma3", "fastv", [], marks=pytest.mark.conformance),
        pytest.param("llava", "sparsevlm", ["first=1", "second=2", "third=4"], marks=pytest.mark.conformance),
    ],
)
def test_a_decode_step_runs_no_node_of_a_cut(
    fused: list[Any], monkeypatch: pytest.MonkeyPatch, family: str, preset: str, overrides: list[str]
) -> None:
    model, _ = build(family)
    compiled = tvc.compile(model, load_policy(preset, overrides), inputs=inputs(family, 2), verify=False)
    given = inputs(family, 3)
    steps = [_greedy(compiled, given)]
    monkeypatch.setattr(compiler, "without_cuts", lambda draft: draft)
    compiled.engine.run = compiler.GraphRunner(compiled.engine.run.program)
    steps.append(_greedy(compiled, given))
    for (with_cuts, more), (without, less) in zip(steps[1], steps[0], strict=True):
        torch.testing.assert_close(without, with_cuts, rtol=0, atol=0)
        assert less.total() <= more.total()
    prefill, *decode = [ops for _, ops in steps[0]]
    assert prefill["tvc.shorten.default"] >= 1
    assert all(not ops["tvc.shorten.default"] and not ops["tvc.top_keep.default"] for ops in decode)
    assert decode[0].total() < steps[1][1][1].total() - 20


def _greedy(compiled: Any, given: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, Counter[str]]]:
    """Logits of a prefill and of the steps behind it, a text-only turn of three tokens among them, and their ops."""
    steps, ids, mask, cache = [], given["input_ids"], given["attention_mask"], None
    for width in (0, 1, 3, 1):
        extra = {} if width else {name: value for name, value in given.items() if name not in ("input_ids",)}
        with _Ops() as ops:
            answer = compiled(**{"input_ids": ids, "attention_mask": mask, "past_key_values": cache, **extra})
        steps.append((answer.logits, ops.names))
        ids = answer.logits[:, -1:].argmax(-1).expand(-1, {0: 1, 1: 3, 3: 1}[width])
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        cache = answer.past_key_values
    return steps
