"""How sure a share is: intervals for accuracies and for accuracies relative to another model's."""

from __future__ import annotations

import math

import numpy as np

Z = 1.959964  # of a 95 % interval
RESAMPLES = 2000


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share observed in `count` independent trials.

    Reference: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
    """
    if not count:
        return 0.0, 1.0
    spread = Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def relative(right: np.ndarray, dense: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(ratio, low, high): mean of `right` [N] over mean of `dense` [N], with a 95 % interval.

    Both are scores of the same examples, so examples are resampled in pairs (percentile bootstrap). NaN where the dense
    model is never right.
    """
    if not dense.any():
        return math.nan, math.nan, math.nan
    picked = np.random.default_rng(seed).integers(len(right), size=(RESAMPLES, len(right)))
    below = dense[picked].mean(1)
    ratios = right[picked].mean(1)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(right.mean() / dense.mean()), float(low), float(high)
