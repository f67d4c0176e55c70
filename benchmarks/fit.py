"""The line through measured times."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def fit(costs: Mapping[int, float]) -> tuple[float, float]:
    """(a, b) of cost = a + b * count, by least squares of the relative error."""
    counts, values = np.array(list(costs), dtype=float), np.array(list(costs.values()))
    per_count, constant = np.polyfit(counts, values, 1, w=1 / values)
    return float(constant), float(per_count)
