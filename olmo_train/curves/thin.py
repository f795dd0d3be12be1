"""Keep a long series small without losing a spike.

Cut the steps into buckets and keep the first, lowest, highest and last point of each (M4, Jugel et al. 2014), which draws the
same pixels as all points would. Half of the buckets are equal on a linear axis and half on a logarithmic one, because the
left of a log axis shows only the first hundred steps of a million.
"""

from __future__ import annotations

import numpy as np

from olmo_train.curves.runs import Series


def thin(series: Series, max_points: int) -> Series:
    """At most `max_points` points of the series, unchanged; the series itself when it has no more."""
    if len(series) <= max_points:
        return series
    bucket = _buckets(series.steps, max_points // 5)  # 4 points a bucket, and one that is not finite
    starts = np.flatnonzero(np.append(True, bucket[1:] != bucket[:-1]))
    ends = np.append(starts[1:], len(bucket))
    finite = np.isfinite(series.values)
    by_value = np.lexsort((series.values, ~finite, bucket))  # in each bucket: finite ones rising, then the others
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    some = counts > 0
    not_finite = starts[counts < ends - starts] + counts[counts < ends - starts]  # the first of the others
    keep = [starts, ends - 1, by_value[starts[some]], by_value[(starts + counts - 1)[some]], by_value[not_finite]]
    keep = np.unique(np.concatenate(keep))
    return Series(series.steps[keep], series.values[keep])


def means(series: Series, max_points: int) -> Series:
    """The mean of the finite values of each bucket at the bucket's mean step: what a smoothed curve is made from.

    (The points that `thin` keeps are extremes, so an average over them would be wrong.)
    """
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if len(steps) <= max_points:
        return Series(steps, values)
    bucket = _buckets(steps, max_points)
    starts = np.flatnonzero(np.append(True, bucket[1:] != bucket[:-1]))
    counts = np.diff(np.append(starts, len(steps)))
    mean_steps = np.add.reduceat(steps.astype(np.float64), starts) / counts
    return Series(np.rint(mean_steps).astype(np.int64), np.add.reduceat(values, starts) / counts)


def smooth(series: Series, window: float) -> Series:
    """Average over about `window` steps to each side, with weights that fall off to both (a triangle).

    Both sides, because an average over the past alone lags behind a falling loss; in steps, so that runs logged at
    other intervals compare. Values must be finite, as those of `means` are.
    """
    return _average(_average(series, window / 2), window / 2)  # two boxes make a triangle


def spread(series: Series, ends: np.ndarray, max_points: int, window: float) -> tuple[Series, Series]:
    """The lowest and highest values `ends` (2, n) around a mean, thinned as `series` is, or averaged as its smoothed curve is."""
    low, high = (Series(series.steps, values) for values in ends)
    if window:
        return smooth(means(low, max_points), window), smooth(means(high, max_points), window)
    kept = np.searchsorted(series.steps, thin(series, max_points).steps)
    return Series(series.steps[kept], low.values[kept]), Series(series.steps[kept], high.values[kept])


def _average(series: Series, reach: float) -> Series:
    """Mean of the points within `reach` steps; towards the first step both sides shrink, so that the start stays."""
    steps = series.steps.astype(np.float64)
    before = np.minimum(reach, steps - steps[:1])
    after = np.minimum(before, steps[-1:] - steps)
    first, end = np.searchsorted(steps, steps - before, "left"), np.searchsorted(steps, steps + after, "right")
    sums = np.append(0.0, np.cumsum(series.values))
    return Series(series.steps, (sums[end] - sums[first]) / (end - first))


def _buckets(steps: np.ndarray, count: int) -> np.ndarray:
    """The bucket of each step, rising: at most `count` buckets between the first step and the last."""
    first, last = int(steps[0]), int(steps[-1])
    linear = np.linspace(first, last, count // 2)[1:-1]
    logarithmic = first - 1 + np.geomspace(1, last - first + 1, count - count // 2)[1:-1]
    return np.searchsorted(np.sort(np.concatenate([linear, logarithmic])), steps)
