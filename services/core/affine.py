"""A straight line learned from what happened: ``y = base + slope * x``, old observations fading."""

from __future__ import annotations

# How far one observation may be off what was expected, as a factor: a stall of seconds says nothing about the next request.
_MAX_SURPRISE = 4.0


class AffineFit:
    """Least squares with exponential forgetting. Neither part is ever below 0.

    Where all observations lie at one ``x`` nothing tells base and slope apart; they are drawn towards a line through the
    origin then, which expects more of a larger ``x`` than any other.
    """

    def __init__(self, *, memory: float = 100.0, least_surprise: float = 0.0) -> None:
        """Weights fall to 1/e in ``memory`` observations. Surprises below ``least_surprise`` (in y) are always believed."""
        self._keep = 1.0 - 1.0 / memory
        self._least_surprise = least_surprise
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def is_known(self) -> bool:
        return self._n > 0.0

    def observe(self, x: float, y: float, weight: float = 1.0) -> None:
        """``weight``: of how many observations this is one."""
        if self.is_known:
            y = min(y, max(self._least_surprise, _MAX_SURPRISE * self.at(x)))
        keep = self._keep**weight
        self._n = keep * self._n + weight
        self._x = keep * self._x + weight * x
        self._y = keep * self._y + weight * y
        self._xx = keep * self._xx + weight * x * x
        self._xy = keep * self._xy + weight * x * y

    @property
    def slope(self) -> float:
        if not self.is_known:
            return 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        if mean_x <= 0.0:
            return 0.0
        spread = max(0.0, self._xx / self._n - mean_x * mean_x)
        common = self._xy / self._n - mean_x * mean_y
        # A tenth of the mean, squared, as the spread of what is assumed.
        assumed = 0.01 * mean_x * mean_x
        slope = (common + assumed * mean_y / mean_x) / (spread + assumed)
        return min(max(0.0, slope), mean_y / mean_x)

    def at(self, x: float) -> float:
        """Expected ``y``; 0.0 while nothing is known."""
        if not self.is_known:
            return 0.0
        slope = self.slope
        return max(0.0, self._y / self._n - slope * self._x / self._n) + slope * x
