"""Spectral embeddings: the space behind them, what groups do not depend on, and what is found that distances miss."""

from __future__ import annotations

import math

import numpy as np
import pydantic
import pytest
import torch
from kernel_oracles_spectral import columns_of, laplacian

from tvc.kernels.eigenspace import smallest
from tvc.kernels.op import Scope
from tvc.kernels.select_medoids import Medoids
from tvc.kernels.select_spectral import Spectral, spectral_rows


def scope_of(tokens: int) -> Scope:
    return Scope(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]]), 1)


def kept(feature: torch.Tensor, number: int, sigma: float, relative: bool = False) -> list[int]:
    rule = Spectral.model_validate({"keep": number, "sigma": sigma, "relative": relative})
    chosen: list[int] = rule.apply(None, scope_of(feature.shape[1]), feature)[0].tolist()
    return chosen


def with_eigenvalues(values: list[float], seed: int = 0) -> torch.Tensor:
    """[n, n] float64 symmetric, with eigenvectors at random."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T
    return (matrix + matrix.T) / 2


SPECTRA = {
    "even": [0.1 * i for i in range(20)],
    "odd-number": [0.0, 0.3, 0.31, 0.9, 1.5, 1.7, 1.9],
    "falling-off": [2.0**-i for i in range(12)],
    "all-but-one-near-one": [0.0, *(1 - 0.5**i for i in range(8, 16))],
    "far-apart-in-size": [0.0, 0.01, 0.02, 1.0, 1000.0],
    "one": [0.7],
    "two": [0.0, 1.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_projector_is_that_of_the_eigenvectors(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    matrix, size = with_eigenvalues(values), len(values)
    for number in range(1, size + 1):
        segment, counts = torch.zeros(1, size, dtype=torch.int64), torch.tensor([[size]])
        made = smallest(matrix[None], segment, counts, torch.tensor([[number]]))[0]
        vectors = torch.linalg.eigh(matrix).eigenvectors[:, :number]
        # An error of 1e-15 turns eigenvectors by that over the gap between eigenvalues, here 1e-5 of the largest.
        torch.testing.assert_close(made, vectors @ vectors.T, rtol=0, atol=1e-9)


def test_equal_eigenvalues_stay_together() -> None:
    matrix, segment = with_eigenvalues([0.0, 0.4, 0.4, 0.4, 0.9, 0.9]), torch.zeros(1, 6, dtype=torch.int64)
    taken = {}
    for number in range(1, 7):
        made = smallest(matrix[None], segment, torch.tensor([[6]]), torch.tensor([[number]]))[0]
        torch.testing.assert_close(made @ made, made, rtol=0, atol=1e-9)
        taken[number] = round(float(made.trace()), 6)
    # Part of the three or of the two is none of them.
    assert taken == {1: 1.0, 2: 1.0, 3: 1.0, 4: 4.0, 5: 4.0, 6: 6.0}
    lowest = with_eigenvalues([0.1, 0.1, 0.1, 0.8, 0.9, 1.0])
    made = smallest(lowest[None], segment, torch.tensor([[6]]), torch.tensor([[2]]))[0]
    assert round(float(made.trace()), 6) == 3.0


def test_segments_are_decided_by_themselves_wherever_their_tokens_stand() -> None:
    blocks = [with_eigenvalues([0.0, 0.2, 0.5, 1.1], 1), with_eigenvalues([0.0, 30.0, 70.0], 2)]
    segment = torch.tensor([[0, 1, -1, 0, 1, 1, 0, -1, 0]])
    matrix = torch.zeros(1, 9, 9, dtype=torch.float64)
    places = [(segment[0] == number).nonzero().flatten() for number in range(2)]
    for at, block in zip(places, blocks, strict=True):
        matrix[0, at[:, None], at] = block
    made = smallest(matrix, segment, torch.tensor([[4, 3]]), torch.tensor([[2, 1]]))[0]
    for at, block, number in zip(places, blocks, (2, 1), strict=True):
        vectors = torch.linalg.eigh(block).eigenvectors[:, :number]
        torch.testing.assert_close(made[at[:, None], at], vectors @ vectors.T, rtol=0, atol=1e-9)
    assert float(made[places[0][:, None], places[1]].abs().max()) == 0


@pytest.mark.parametrize(("tokens", "number", "sigma"), [(49, 24, 2.0), (31, 5, 1.0), (98, 12, 1.5), (12, 12, 0.3)])
def test_rows_are_as_far_apart_as_those_of_the_eigenvectors(tokens: int, number: int, sigma: float) -> None:
    feature = torch.randn(1, tokens, 5, generator=torch.Generator().manual_seed(tokens))
    scope = scope_of(tokens)
    rows = spectral_rows.overload(feature, scope.segment, scope.counts, 0, number, sigma, False)[0].double()
    columns = columns_of(laplacian(feature[0].tolist(), feature[0].mean(0).tolist(), sigma, False), number)
    assert columns.shape == (tokens, number)
    unit = columns / np.linalg.norm(columns, axis=1, keepdims=True)
    torch.testing.assert_close(torch.cdist(rows, rows), torch.cdist(*[torch.tensor(unit)] * 2), rtol=0, atol=1e-5)


def test_groups_follow_what_hangs_together_and_not_what_is_near() -> None:
    """Two rings around one centre: by distances the outer one is cut to pieces, which take tokens of the inner one."""
    angles = [2 * math.pi * (i + 0.25 * (i % 2)) / 24 for i in range(24)]
    rings = [(r * math.cos(a), r * math.sin(a)) for r in (1.0, 4.0) for a in angles]
    feature = torch.tensor(rings)[None]

    def grouped(chosen: list[int], rows: torch.Tensor) -> list[int]:
        return torch.cdist(rows, rows[chosen]).argmin(1).tolist()

    inner_and_outer = [0] * 24 + [1] * 24
    scope = scope_of(48)
    rows = spectral_rows.overload(feature, scope.segment, scope.counts, 0, 2, 0.6, False)[0]
    assert grouped(kept(feature, 2, 0.6), rows) == inner_and_outer
    plain = Medoids.model_validate({"keep": 2}).apply(None, scope, feature)[0].tolist()
    assert grouped(plain, feature[0]) not in (inner_and_outer, inner_and_outer[::-1])


def test_each_of_several_blobs_keeps_one() -> None:
    generator = torch.Generator().manual_seed(3)
    blob = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1])
    feature = torch.eye(4)[blob][None] * 20 + torch.randn(1, 11, 4, generator=generator)
    assert sorted(blob[kept(feature, 3, 2.0)].tolist()) == [0, 1, 2]
    assert kept(feature, 11, 2.0) == list(range(11))


def test_copies_are_one_group() -> None:
    spots = torch.tensor([[0.0, 1], [2, 0], [1, 3]])
    feature = spots[[0, 0, 1, 0, 2, 1]][None]
    assert kept(feature, 3, 1.0) == [0, 2, 4]
    assert kept(torch.ones(1, 5, 3), 2, 2.0) == [0, 1]


@pytest.mark.parametrize("relative", [False, True])
def test_what_is_kept_depends_on_nothing_but_distances(relative: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(1, 40, 6, generator=generator)
    chosen = kept(feature, 9, 0.7, relative)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert kept(feature @ turn + 3, 9, 0.7, relative) == chosen
    assert (kept(feature * 100, 9, 0.7, relative) == chosen) is relative
    assert kept(feature * 100, 9, 70.0) == kept(feature, 9, 0.7)


def test_a_reach_that_is_none_is_refused() -> None:
    for sigma in (0, -1, math.inf, math.nan):
        with pytest.raises(pydantic.ValidationError, match="sigma"):
            Spectral.model_validate({"keep": 3, "sigma": sigma})
