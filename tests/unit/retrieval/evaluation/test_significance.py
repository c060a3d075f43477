"""The paired bootstrap, beside scipy's and a paired t-test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_rel

from retrieval.evaluation.significance import paired_bootstrap


def test_the_interval_is_scipys_and_p_that_of_a_paired_test():
    chance = np.random.default_rng(0)
    first_I = chance.random(300)
    other_I = first_I + chance.normal(0.01, 0.1, size=300)
    found = paired_bootstrap(first_I, other_I, seed=3)
    expected = bootstrap((other_I - first_I,), np.mean, method="percentile", n_resamples=10_000, batch=1000)
    interval = expected.confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=1e-3)  # both are drawn
    assert found["p"] == pytest.approx(ttest_rel(other_I, first_I).pvalue, abs=0.02)
    assert found["difference"] == pytest.approx((other_I - first_I).mean())
    assert found == paired_bootstrap(first_I, other_I, seed=3) != paired_bootstrap(first_I, other_I, seed=4)


def test_equal_models_do_not_differ_better_ones_do_and_pairing_is_what_shows_it():
    first_I = np.random.default_rng(1).random(200)
    assert paired_bootstrap(first_I, first_I) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    found = paired_bootstrap(first_I, first_I + 0.01)
    assert found["low"] == pytest.approx(0.01) and found["p"] == pytest.approx(1 / 10_001)
    assert paired_bootstrap(first_I, np.random.default_rng(2).permutation(first_I + 0.01))["p"] > 0.3
    assert paired_bootstrap([0.0], [1.0], resamples=9) == {"difference": 1.0, "low": 1.0, "high": 1.0, "p": 0.1}
    with pytest.raises(ValueError):
        paired_bootstrap([0.0, 1.0], [1.0, 0.0, 1.0])
