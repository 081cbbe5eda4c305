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
from tvc.passes.fuse_attention import _score_of_rows
from tvc.policy import load_policy


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Targets keep every op that has kernels, as on CUDA; the evidence of the pass is collected."""
    monkeypatch.setattr(compiler, "kept", lambda target, device: PROVIDED)
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
    assert Counter(change.what for change in fused) == {"attends by positions": 6, "asks for the mask of its rows": 1}
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


def test_what_does_not_fit_stays_and_says_why(fused: list[Any]) -> None:
    model, _ = build("gemma3")
    tvc.compile(model, load_policy("fastv"), inputs=inputs("gemma3", 2), verify=False)
    assert {change.what for change in fused} == {"left as it is"}
    assert {change.why for change in fused} == {
        "its window of 24 tokens counts dropped tokens too",
        "tokens of a span attend in both directions",
    }


@pytest.mark.parametrize("heads", ["mean", "joined"])
def test_a_score_of_rows_needs_their_mask_alone(heads: str) -> None:
    """Rows in any order, padded ones among them, over a cache that is longer than the chunk."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    places = torch.tensor([[-1, 0, 1, 2, -1, 5, 6, 7, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    rows, columns = torch.tensor([[4, -1, 2], [-1, -1, 0]]), torch.arange(8)[None, :, None].expand(2, -1, 1)
    mask = torch.ops.tvc.attention_mask(places[:, -5:], places, 0)
    want = OPS["attention_score"].reference(query, key, mask, rows, columns, 0.3, heads)
    got = _score_of_rows(query, key, places[:, -5:], places, rows, columns, 0.3, heads)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_rows_of_a_chunk_on_top_of_a_past_see_the_past() -> None:
    """A later turn: fewer queries than keys, both padded."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    places = torch.tensor([[-1, 0, 4, 5, 8, 9, 10], [0, 1, 2, 3, -1, 9, 10]])
    mask = torch.ops.tvc.attention_mask(places[:, -3:], places, 0)
    got = torch.ops.tvc.attend(query, key, value, places[:, -3:], places, None, 0.3)
    want = OPS["attention"].reference(query, key, value, mask, 0.3, 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
