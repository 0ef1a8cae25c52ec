"""Fits of what a profile measured, and how far they err on what they were not fitted to. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from baton.services.core.cost_model import DecodeCost, LinkCost, interpolate

_LEAST_S = 1e-9


def prefill_curve(samples: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """(tokens, seconds): the median of each length, growing."""
    by_length: dict[int, list[float]] = {}
    for num_tokens, seconds in samples:
        by_length.setdefault(num_tokens, []).append(seconds)
    curve: list[tuple[int, float]] = []
    for num_tokens, times in sorted(by_length.items()):
        curve.append((num_tokens, max(statistics.median(times), curve[-1][1] if curve else _LEAST_S)))
    return tuple(curve)


def fit_steps(samples: Sequence[tuple[int, float, float]]) -> DecodeCost:
    """From (batch, context tokens of the whole batch, seconds): least squares of the relative error; no part is negative."""
    base_s, per_sequence_s, per_token_s = _fit([(1.0, batch, context) for batch, context, _ in samples], samples)
    return DecodeCost(base_s, per_sequence_s, per_token_s)


def fit_link(samples: Sequence[tuple[int, float]]) -> LinkCost:
    """From (bytes, seconds)."""
    fixed_s, per_byte_s = _fit([(1.0, float(num_bytes)) for num_bytes, _ in samples], samples)
    return LinkCost(fixed_s, 1.0 / per_byte_s if per_byte_s > 0 else 1e12)


def held_out_prefill_error(samples: Sequence[tuple[int, float]]) -> float | None:
    """Mean relative error at each inner length, from a curve without it. None: too few lengths to tell."""
    curve = prefill_curve(samples)
    errors = [
        abs(interpolate(curve[:at] + curve[at + 1 :], curve[at][0]) - curve[at][1]) / curve[at][1]
        for at in range(1, len(curve) - 1)
    ]
    return statistics.fmean(errors) if errors else None


def held_out_step_error(samples: Sequence[tuple[int, float, float]]) -> float | None:
    """Mean relative error at each point of the grid, from a fit without it. None: too few points to tell."""
    points = sorted({(batch, context) for batch, context, _ in samples})
    if len(points) < 5:
        return None
    errors = []
    for point in points:
        fit = fit_steps([sample for sample in samples if sample[:2] != point])
        seen_s = statistics.median(seconds for batch, context, seconds in samples if (batch, context) == point)
        errors.append(abs(fit.step_s(point[0], round(point[1])) - seen_s) / seen_s)
    return statistics.fmean(errors)


def held_out_link_error(samples: Sequence[tuple[int, float]]) -> float | None:
    """The same of transfers."""
    sizes = sorted({num_bytes for num_bytes, _ in samples})
    if len(sizes) < 3:
        return None
    errors = []
    for size in sizes:
        fit = fit_link([sample for sample in samples if sample[0] != size])
        seen_s = statistics.median(seconds for num_bytes, seconds in samples if num_bytes == size)
        errors.append(abs(fit.transfer_s(size) - seen_s) / seen_s)
    return statistics.fmean(errors)


def _fit(features: Sequence[Sequence[float]], samples: Sequence[Sequence[float]]) -> list[float]:
    """Coefficients of ``features`` that make the last number of each sample, at least 0: a term that would be negative is left
    out, the most negative first."""
    num_terms = len(features[0])
    kept = list(range(num_terms))
    while True:
        solution = _least_squares([[row[term] for term in kept] for row in features], [row[-1] for row in samples])
        worst = min(range(len(kept)), key=lambda at: solution[at])
        if solution[worst] >= 0 or len(kept) == 1:
            found = dict(zip(kept, solution, strict=True))
            return [max(0.0, found.get(term, 0.0)) for term in range(num_terms)]
        del kept[worst]


def _least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Normal equations of the relative error, each column scaled to about 1; a column without a spread of its own gets 0."""
    width = len(rows[0])
    scales = [max(abs(row[at]) for row in rows) or 1.0 for at in range(width)]
    matrix = [[0.0] * (width + 1) for _ in range(width)]
    for row, target in zip(rows, targets, strict=True):
        weight = 1.0 / max(target, _LEAST_S) ** 2
        scaled = [value / scale for value, scale in zip(row, scales, strict=True)]
        for i in range(width):
            for j in range(width):
                matrix[i][j] += weight * scaled[i] * scaled[j]
            matrix[i][width] += weight * scaled[i] * target
    least = 1e-9 * max(matrix[i][i] for i in range(width))
    solved = [False] * width
    for column in range(width):
        pivot = matrix[column][column]
        if pivot <= least:
            continue
        solved[column] = True
        for other in range(width):
            if other != column and matrix[other][column]:
                factor = matrix[other][column] / pivot
                matrix[other] = [a - factor * b for a, b in zip(matrix[other], matrix[column], strict=True)]
    return [matrix[i][width] / matrix[i][i] / scales[i] if solved[i] else 0.0 for i in range(width)]
