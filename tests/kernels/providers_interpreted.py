"""Every provider against its op's reference, on the CPU. `test_providers.py` runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from kernel_provider_cases import EXTRA, refused, sized

from tvc.kernels import OPS
from tvc.kernels.providers import PROVIDED, dispatched, provider, support
from tvc.kernels.providers._triton import INTERPRETED
from tvc.kernels.tolerances import TOLERANCES, tolerance

# Their kernels have a program for each token that stays, or many small ones: slow where one thread does it all.
SMALL, ODD, LARGE = (1, 63), (257,), (500, 577, 1000, 2500)
SLOW = frozenset(
    {
        "bipartite_merge",
        "coverage_keep",
        "medoids_keep",
        "merge_clusters",
        "merge_nearest",
        "novelty_score",
        "pagerank_score",
        "segment_pool",
        "window_merge",
    }
)
HALVES = [dtype for dtype in TOLERANCES if dtype != torch.float32]


def _cases(names: Iterable[str], sizes: tuple[int, ...] | None, every: bool = False) -> list[Any]:
    """Those of the file of cases that have a size, or `every` one; without `sizes` each op's own."""
    made = []
    for name in sorted(names):
        torch.manual_seed(0)
        # Of the op's own cases those that the provider takes; it has to take all that were made for it.
        taken = (case for case in OPS[name].cases() if support(name, *case[1]).ok)
        given = taken if sizes is None else EXTRA[name](sizes)
        chosen = given if every or sizes is None else sized(given)
        made += [pytest.param(name, arguments, id=f"{name}-{case}") for case, arguments in chosen]
    return made


def _converted(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Floats in another type; strides stay."""
    return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments)


GUARD = 64  # numbers in front of and behind every tensor that a launch makes


def _guarded(made: Callable[..., torch.Tensor], guards: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`made` with poison in what nobody wrote, inside a larger piece of memory whose ends are remembered."""

    def make(*arguments: Any, **named: Any) -> torch.Tensor:
        values = made(*arguments, **named)
        whole = values.new_zeros(values.numel() + 2 * GUARD)
        whole.fill_(float("nan") if whole.is_floating_point() else 99)
        guards.extend((whole[:GUARD], whole[-GUARD:]))
        return whole[GUARD : GUARD + values.numel()].view(values.shape)

    return make


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody wrote holds NaN, or an index out of range; what lies around a tensor keeps it."""
    guards: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "empty", _guarded(torch.empty, guards))
    monkeypatch.setattr(torch, "empty_like", _guarded(torch.empty_like, guards))
    monkeypatch.setattr(torch.Tensor, "new_empty", _guarded(torch.Tensor.new_empty, guards))
    yield
    for guard in guards:
        assert bool((guard.isnan() if guard.is_floating_point() else guard == 99).all()), "written outside of a tensor"


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _run(name: str, arguments: tuple[Any, ...]) -> tuple[tuple[torch.Tensor, ...], bool]:
    """What the op gives on CUDA, and whether its reference computed it."""
    calls = []

    def reference(*given: Any) -> Any:
        calls.append(given)
        return OPS[name].reference(*given)

    return _outputs(dispatched(name, reference)(*arguments)), bool(calls)


def _compare(name: str, arguments: tuple[Any, ...]) -> None:
    before = [a.clone() if torch.is_tensor(a) else a for a in arguments]
    got, by_reference = _run(name, arguments)
    assert not by_reference, support(name, *arguments).reason
    for value, expected in zip(got, _outputs(OPS[name].reference(*arguments)), strict=True):
        assert (value.dtype, value.shape, value.is_contiguous()) == (expected.dtype, expected.shape, True)
        if value.is_floating_point():
            bar = tolerance(name, value.dtype)
            torch.testing.assert_close(value.double(), expected.double(), rtol=bar.rtol, atol=bar.atol, equal_nan=True)
        else:
            assert value.tolist() == expected.tolist()
    for was, now in zip(before, arguments, strict=True):
        if torch.is_tensor(now):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def test_kernels_are_interpreted() -> None:
    assert INTERPRETED


@pytest.mark.parametrize(("name", "arguments"), _cases(PROVIDED, None))
def test_provider_equals_reference(name: str, arguments: tuple[Any, ...]) -> None:
    _compare(name, arguments)


@pytest.mark.parametrize(("name", "arguments"), _cases(PROVIDED, SMALL, every=True))
def test_provider_equals_reference_at_small_sizes(name: str, arguments: tuple[Any, ...]) -> None:
    _compare(name, arguments)


# Kernels treat both halves alike.
@pytest.mark.parametrize(("name", "arguments"), _cases(PROVIDED - SLOW, (63,)))
def test_provider_equals_reference_in_bfloat16(name: str, arguments: tuple[Any, ...]) -> None:
    _compare(name, _converted(arguments, torch.bfloat16))


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("name", "arguments"), [*_cases(PROVIDED, None), *_cases(PROVIDED, SMALL, every=True)])
def test_provider_equals_reference_in_half_precision(name: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    _compare(name, _converted(arguments, dtype))


@pytest.mark.parametrize(("name", "arguments"), _cases(PROVIDED - SLOW, ODD))
def test_provider_equals_reference_at_odd_sizes(name: str, arguments: tuple[Any, ...]) -> None:
    _compare(name, arguments)


@pytest.mark.conformance
@pytest.mark.parametrize(("name", "arguments"), [*_cases(PROVIDED - SLOW, LARGE), *_cases(SLOW, (577,))])
def test_provider_equals_reference_at_larger_sizes(name: str, arguments: tuple[Any, ...]) -> None:
    if support(name, *arguments).ok:
        _compare(name, arguments)
    else:
        assert _run(name, arguments)[1]


def test_distances_in_several_strips_give_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider("merge_clusters"), "MOST_BYTES", 1)
    torch.manual_seed(0)
    _compare("merge_clusters", dict(EXTRA["merge_clusters"](()))["two-tiles"])


@pytest.mark.parametrize("name", sorted(PROVIDED - {"attention_runs"}))  # which takes everything
def test_what_a_provider_refuses_the_reference_computes(name: str) -> None:
    cases = list(refused(name))
    assert cases
    for case, arguments in cases:
        found = support(name, *arguments)
        assert not found.ok, case
        assert found.reason, case
    got, by_reference = _run(name, cases[0][1])
    assert by_reference
    for value, expected in zip(got, _outputs(OPS[name].reference(*cases[0][1])), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_attention_score_takes_the_way_that_fits_its_rows() -> None:
    ways = {}
    for rows, heads in ((1, "mean"), (32, "mean"), (33, "mean"), (64, "joined"), (65, "joined")):
        query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
        which = torch.zeros(1, rows, dtype=torch.int64)
        ways[rows, heads] = provider("attention_score").variant(query, key, which, heads)
    assert ways == {
        (1, "mean"): "rows",
        (32, "mean"): "rows",
        (33, "mean"): "columns",
        (64, "joined"): "rows",
        (65, "joined"): "columns",
    }


def test_more_slots_than_are_counted_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider("shorten"), "MOST", 8)
    for _, arguments in (*OPS["shorten"].cases(), *EXTRA["shorten"]((63,))):
        _compare("shorten", arguments)


def test_the_keys_of_a_long_cache_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvc.kernels.providers._decode.LEAST_KEYS", 32)
    for _, arguments in EXTRA["attend"]((63, 200)):
        _compare("attend", arguments)
