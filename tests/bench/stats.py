"""Medians and quantiles of samples."""

import math
import statistics
from collections.abc import Sequence

median = statistics.median


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` (0 to 1) of all do not exceed; ValueError when there are none."""
    if not samples:
        raise ValueError("no samples, no quantile")
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(samples: Sequence[float]) -> float:
    """How far the rounds lie apart: (largest - smallest) / median."""
    middle = median(samples)
    return (max(samples) - min(samples)) / middle if middle else 0.0
