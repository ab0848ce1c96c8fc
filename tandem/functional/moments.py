"""Running mean and variance on plain floats, so that they can live in a checkpoint's JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean of some numbers."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two numbers."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


def moments(values: Iterable[float]) -> Moments:
    """The moments of these numbers, computed in two passes."""
    numbers = list(values)
    if not numbers:
        return Moments()
    mean = math.fsum(numbers) / len(numbers)
    return Moments(float(len(numbers)), mean, math.fsum((x - mean) ** 2 for x in numbers))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of numbers together (Chan, Golub and LeVeque 1979, eq. 2.1)."""
    count = a.count + b.count
    if count == 0:
        return Moments()
    delta = b.mean - a.mean
    mean = a.mean + delta * b.count / count
    return Moments(count, mean, a.squares + b.squares + delta**2 * a.count * b.count / count)
