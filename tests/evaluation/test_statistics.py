"""Intervals against published values and against repeated sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvc.evaluation.statistics import relative, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # R: prop.test(x, n, correct = FALSE)$conf.int
    [(5, 10, 0.2366, 0.7634), (90, 100, 0.8256, 0.9448), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson_intervals(right, count, low, high):
    assert wilson(right / count, count) == pytest.approx((low, high), abs=2e-4)


def test_nothing_observed_says_nothing():
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_an_interval_holds_the_true_ratio_as_often_as_it_says():
    rng, inside = np.random.default_rng(1), 0
    for trial in range(200):
        dense = rng.random(200) < 0.9
        right = dense & (rng.random(200) < 0.8)  # true ratio 0.8
        ratio, low, high = relative(right.astype(float), dense.astype(float), trial)
        assert low <= ratio <= high
        inside += low <= 0.8 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_equal_replies_have_ratio_one_without_doubt():
    scores = np.array([1.0, 0.0, 1.0, 1.0])
    assert relative(scores, scores) == (1.0, 1.0, 1.0)


def test_a_model_that_is_never_right_has_no_ratio():
    assert all(math.isnan(value) for value in relative(np.ones(3), np.zeros(3)))
