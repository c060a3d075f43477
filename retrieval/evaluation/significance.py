"""Whether one model is better than another on the same items, or was lucky with them: the paired bootstrap.

Shape suffixes: I items (queries, or texts of a test set), R resamples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lodestar.config.loader import Section
from lodestar.config.schema import Natural

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Bootstrap(Section):
    resamples: Natural = 10_000
    """0: no comparison."""
    seed: Annotated[int, Field(ge=0)] = 42


def paired_bootstrap(
    first_I: ArrayLike, other_I: ArrayLike, *, resamples: int = 10_000, seed: int = 42
) -> dict[str, float]:
    """`difference`, the mean of other - first; `low` and `high`, its 95 % percentile interval; and `p`, two-sided.

    first_I, other_I   the same measure of the same items, by two models
    p                  how often resampled differences, moved to a mean of 0, are as far from it as the one found:
                       Sakai, Evaluating Evaluation Metrics based on the Bootstrap, SIGIR 2006; never below 1 / (R + 1)
    """
    import numpy as np

    delta_I = np.asarray(other_I, float) - np.asarray(first_I, float)  # ValueError where the items differ in number
    items, found = len(delta_I), float(delta_I.mean())
    rng = np.random.default_rng(seed)
    rows = max(1, (1 << 22) // items)  # resamples at once: 32 MB of item numbers
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    mean_R = np.concatenate([delta_I[rng.integers(items, size=(size, items))].mean(1) for size in sizes])
    low, high = np.quantile(mean_R, [0.025, 0.975])
    as_far = int((np.abs(mean_R - found) >= abs(found) - 1e-12).sum())
    return {"difference": found, "low": float(low), "high": float(high), "p": (1 + as_far) / (1 + resamples)}
