"""Statistical significance of the difference of two models on the same items: the paired bootstrap.

Shape suffixes: I items (queries, or texts of a test set), R resamples.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike


class BootstrapResult(TypedDict):
    difference: float
    """The mean of other - first."""
    low: float
    high: float
    """The 95 % percentile interval."""
    p: float
    """Two-sided."""


def paired_bootstrap(
    first_I: ArrayLike, other_I: ArrayLike, *, resamples: int = 10_000, seed: int = 42
) -> BootstrapResult:
    """Compare two models by one metric of the same items.

    p is the fraction of resampled differences, shifted to a mean of 0, that are as far from 0 as the observed one:
    Sakai, Evaluating Evaluation Metrics based on the Bootstrap, SIGIR 2006. It is never below 1 / (R + 1).
    """
    delta_I = np.asarray(other_I, float) - np.asarray(first_I, float)  # ValueError where the items differ in number
    num_items, observed = len(delta_I), float(delta_I.mean())
    rng = np.random.default_rng(seed)
    batch_size = max(1, (1 << 22) // num_items)  # resamples at once: 32 MB of item numbers
    sizes = [min(batch_size, resamples - start) for start in range(0, resamples, batch_size)]
    mean_R = np.concatenate([delta_I[rng.integers(num_items, size=(size, num_items))].mean(1) for size in sizes])
    low, high = np.quantile(mean_R, [0.025, 0.975])
    as_far = int((np.abs(mean_R - observed) >= abs(observed) - 1e-12).sum())
    return {"difference": observed, "low": float(low), "high": float(high), "p": (1 + as_far) / (1 + resamples)}
