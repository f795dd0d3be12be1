"""Fit L(N, D) = E + A / N^a + B / D^b to the losses of several runs, and forecast the loss of a larger one.

N is the number of parameters and D of tokens (Hoffmann et al. 2022, "Chinchilla", approach 3). The fit minimizes the Huber loss
of the residuals of log L, from many starts. A forecast has a 90% interval for the loss of a single run: a bootstrap resamples the
residuals of the points, and where runs of a size are not independent, a jackknife leaves out each size; see `Fit.forecast`.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from olmo_train.errors import ConfigError, DataError, nearest, reason
from olmo_train.formats import counted

# Smaller residuals count squared, larger ones linearly. Hoffmann et al. 2022 (section 3.3) fit 400 runs with 1e-3; a ladder has a
# dozen, with noise of about 0.5%, for which 1e-2 makes the deviation of a and b smaller by a fifth.
HUBER_DELTA = 1e-2
PARAMETERS = 5  # E, A, B, a, b
LEAST_RUNS = PARAMETERS + 1  # else no residual says how noisy the runs are
REPLICATES = 1000  # of the bootstrap
LEVEL = 0.9  # of all intervals
ROUND_STEPS, MOST_ROUNDS, TOLERANCE = 10, 40, 1e-4  # of the search: it ends when a round lowers the Huber loss by less
MOST_EXPONENT = 3.0  # far above any that was ever measured; keeps a fit of noise finite
# The 95% quantile of Student's t distribution with 3, 4, ... 10 degrees of freedom; that of 10 is taken for more.
T = (2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
SAME = 1.05  # sizes, and tokens per parameter, that differ by less count once


@dataclass(frozen=True)
class Points:
    """Runs to fit: parameters, tokens and the loss of each, all (runs,) in fp64."""

    parameters: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray

    @property
    def sizes(self) -> int:
        """Number of different model sizes."""
        return distinct(self.parameters)

    @property
    def multiples(self) -> int:
        """Number of different multiples, tokens per parameter."""
        return distinct(self.tokens / self.parameters)

    @property
    def can_be_fitted(self) -> bool:
        """Whether they can identify the five parameters."""
        return self.sizes >= 3 and self.multiples >= 2 and distinct(self.tokens) >= 2 and len(self.losses) >= LEAST_RUNS

    def check(self, where: object, fix: str) -> None:
        """Refuse points that cannot identify the five parameters. Raises ConfigError, which ends in `fix`."""
        found = f"{counted(self.sizes, 'size')} and {counted(self.multiples, 'multiple')} (tokens per parameter)"
        if not self.can_be_fitted:
            runs, least = counted(len(self.losses), "run"), f"at least 3 sizes, 2 multiples and {LEAST_RUNS} runs"
            raise ConfigError(where, f"{runs} of {found} cannot be fitted, which needs {least}; {fix}")

    def without_each_size(self) -> list[Points]:
        """The points without the runs of each size in turn; nothing if one of these parts cannot be fitted."""
        kept = [self.parameters != size for size in np.unique(self.parameters)]
        parts = [Points(self.parameters[part], self.tokens[part], self.losses[part]) for part in kept]
        return parts if all(part.can_be_fitted for part in parts) else []


def distinct(values: np.ndarray) -> int:
    """How many values there are, those that differ by less than SAME counted once."""
    ordered = np.sort(values)
    return int(1 + (ordered[1:] > SAME * ordered[:-1]).sum()) if len(ordered) else 0


def read_points(file: Path, column: str | None) -> Points:
    """The runs of a CSV file: columns `parameters`, `tokens`, and losses in `column`; lines that begin with # are comments.
    Raises ConfigError for an unknown column, DataError for a file that cannot be read."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip() and line[0] != "#"]
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(file, f"cannot be read: {reason(problem)}; name a CSV file") from problem
    rows = list(csv.DictReader(lines))
    columns = [name for name in rows[0] if name] if rows else []
    for name in ("parameters", "tokens"):
        if name not in columns:
            what = f"has no column '{name}'" if rows else "has no runs"
            raise DataError(file, f"{what}; write a line 'parameters,tokens,loss' and below it one line for each run")
    if column not in columns:
        others = [name for name in columns if name not in ("parameters", "tokens")]
        raise ConfigError(
            "--column", f"{column or 'is missing'}: name a column of losses in {file}; {nearest(column or '', others)}"
        )
    names = ("parameters", "tokens", column)
    return Points(*(np.array([_number(file, i, name, row[name]) for i, row in enumerate(rows, 1)]) for name in names))


def _number(file: Path, row: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(file, f"row {row} has '{text or ''}' as {name}; write a number above 0, or leave the row out")
    return value


# ---- the law: theta is (log E, log A', log B', a, b), with A' and B' at the geometric means of N and D


@dataclass(frozen=True)
class Forecast:
    """The loss of one run of this size, and its 90% interval."""

    parameters: float
    tokens: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """The law that was fitted to some points."""

    points: Points
    theta: np.ndarray  # (5,)
    sizes_share: bool = False  # runs of a size share a part of their training, as the branches of a ladder do

    @cached_property
    def centre(self) -> tuple[float, float]:
        """The means of log N and log D."""
        return float(np.log(self.points.parameters).mean()), float(np.log(self.points.tokens).mean())

    @cached_property
    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """log N and log D of the points, less their means."""
        return self.scaled(self.points.parameters, self.points.tokens)

    def scaled(self, parameters: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
        """log N and log D, less the means of the points."""
        return np.log(np.atleast_1d(parameters)) - self.centre[0], np.log(np.atleast_1d(tokens)) - self.centre[1]

    def loss(self, parameters: Any, tokens: Any) -> np.ndarray:
        """The fitted loss of models of these sizes, (runs,)."""
        return np.exp(log_loss(self.theta, *self.scaled(parameters, tokens))[0])

    @cached_property
    def residuals(self) -> np.ndarray:
        """log of measured over fitted loss of each point, (runs,)."""
        return np.log(self.points.losses) - log_loss(self.theta, *self.coordinates)[0]

    @property
    def noise(self) -> float:
        """The standard deviation of log L around the law, with the degrees of freedom that the five parameters leave."""
        return float(deviation(self.residuals))

    def named(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """E, A, B, a, b from theta (..., 5)."""
        log_e, log_a, log_b, a, b = np.moveaxis(theta, -1, 0)
        return {"E": np.exp(log_e), "A": np.exp(log_a + a * self.centre[0]), "B": np.exp(log_b + b * self.centre[1]),
                "a": a, "b": b}  # fmt: skip

    @cached_property
    def law(self) -> dict[str, float]:
        """E, A, B, a, b."""
        return {name: float(value) for name, value in self.named(self.theta).items()}

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """90% of the bootstrap's values of E, A, B, a, b."""
        found = {name: np.quantile(values, TAILS) for name, values in self.named(self._replicates[0]).items()}
        return {name: (float(low), float(high)) for name, (low, high) in found.items()}

    @cached_property
    def _replicates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the bootstrap: theta (replicates, 5), the noise around each (replicates,), and the residual of one more run each,
        (replicates,). Seeded: the same points have the same intervals."""
        random, runs = np.random.default_rng(0), len(self.residuals)
        # The fit follows the points, so its residuals are too small: by (runs - 5) / runs in their mean square.
        drawn = (self.residuals - self.residuals.mean()) * math.sqrt(runs / (runs - PARAMETERS))
        fitted = log_loss(self.theta, *self.coordinates)[0]
        losses = fitted + random.choice(drawn, (REPLICATES, runs))
        theta = minimize(np.tile(self.theta, (REPLICATES, 1)), *self.coordinates, losses)[0]
        return theta, deviation(losses - log_loss(theta, *self.coordinates)[0]), random.choice(drawn, REPLICATES)

    @cached_property
    def _without_each_size(self) -> list[Fit]:
        return [fit(part) for part in self.points.without_each_size()] if self.sizes_share else []

    def _half_width_of_sizes(self, parameters: float, tokens: float) -> float:
        """Of the 90% interval for log L by Student's t, from the jackknife's standard error over sizes; 0 without a jackknife."""
        fits = self._without_each_size  # none, or at least four
        if not fits:
            return 0.0
        logs = np.log([part.loss(parameters, tokens)[0] for part in fits])
        return T[min(len(fits) - 4, len(T) - 1)] * math.sqrt((len(fits) - 1) * logs.var())

    def forecast(self, parameters: float, tokens: float) -> Forecast:
        """The loss of one run of this size, with its 90% interval, which contains the noise of that run.

        A residual bootstrap, studentized (Davison and Hinkley 1997, sections 6.3.2 and 6.3.3; Stine 1985). Each replicate draws
        the residuals of the points with replacement, made larger for the degrees of freedom that the fit has used, adds them to
        the fitted losses, fits again, and draws one more residual for the new run. The error of its forecast is divided by the
        noise around its own fit, and the quantiles are multiplied by the noise around the true points. As with Student's t, few
        points widen the interval. It knows nothing of errors that all runs share, such as a law that bends outside the points.

        It takes runs for independent. Branches of a size share its stable run, so the seed of a size moves them together, and the
        fit follows where their residuals cannot show it. A delete-a-group jackknife over the sizes (Efron and Tibshirani 1993,
        section 11.5) measures how much: its half width is added to the bootstrap's as independent errors add, in squares.
        """
        at = self.scaled(parameters, tokens)
        centre = float(log_loss(self.theta, *at)[0][0])
        theta, noise, residual = self._replicates
        error = residual - (log_loss(theta, *at)[0][:, 0] - centre)
        ratio = error / np.maximum(noise, 1e-3 * self.noise + 1e-300)
        low, high = self.noise * np.quantile(ratio, TAILS)
        shared = self._half_width_of_sizes(parameters, tokens)
        ends = (centre, centre - math.hypot(min(low, 0), shared), centre + math.hypot(max(high, 0), shared))
        return Forecast(parameters, tokens, *(math.exp(value) for value in ends))

    def times_largest(self, forecast: Forecast) -> float:
        """The compute of the forecast's run, over the largest compute of the points; 6 N D FLOPs each."""
        return forecast.parameters * forecast.tokens / float((self.points.parameters * self.points.tokens).max())

    def doubt(self, forecast: Forecast) -> str:
        """Why a forecast says little, or nothing."""
        best = float(self.points.losses.min())
        if forecast.high < best:
            return ""
        return f"cannot tell whether it is below the loss of the best run, {best:.4f}; add sizes or multiples"

    def record(self) -> dict[str, Any]:
        """The fit as JSON."""
        return self.law | {
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "residual_std": self.noise,
            "runs": len(self.points.losses),
            "sizes": self.points.sizes,
            "multiples": self.points.multiples,
        }


TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def fit(points: Points, sizes_share: bool = False) -> Fit:
    """The law with the smallest Huber loss, from the best of many starts. `points.check` comes first. `sizes_share`: see Fit."""
    found = Fit(points, np.empty(PARAMETERS))
    logs = np.log(points.losses)
    first = starts(float(logs.mean()))
    theta, objective = minimize(first, *found.coordinates, np.broadcast_to(logs, (len(first), len(logs))))
    return Fit(points, theta[objective.argmin()], sizes_share)


def starts(mean: float) -> np.ndarray:
    """Where the search begins, (starts, 5): several shares of E in the mean loss, and pairs of exponents."""
    shares, exponents = (0.1, 0.4, 0.7, 0.9), (0.1, 0.3, 0.6, 1.0)
    return np.array(
        [
            (mean + math.log(share), mean + math.log((1 - share) / 2), mean + math.log((1 - share) / 2), a, b)
            for share, a, b in product(shares, exponents, exponents)
        ]
    )


def log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L (..., runs) for theta (..., 5) at scaled log N and log D (runs,), and the share of each term in L (..., runs, 3)."""
    log_e, log_a, log_b, a, b = (theta[..., i, None] for i in range(PARAMETERS))
    terms = np.stack([log_e + 0 * n, log_a - a * n, log_b - b * d], axis=-1)
    largest = terms.max(axis=-1, keepdims=True)
    shares = np.exp(terms - largest)
    total = shares.sum(axis=-1, keepdims=True)
    return (largest + np.log(total))[..., 0], shares / total


def deviation(residuals: np.ndarray) -> np.ndarray:
    """The standard deviation of residuals (..., runs) of a fit with five parameters."""
    return np.sqrt((residuals**2).sum(axis=-1) / (residuals.shape[-1] - PARAMETERS))


def huber(residuals: np.ndarray) -> np.ndarray:
    """The sum of the Huber losses of residuals (..., runs)."""
    size = np.abs(residuals)
    return np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum(axis=-1)


def minimize(theta: np.ndarray, n: np.ndarray, d: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimize the Huber loss of log losses (rows, runs) from every row of theta (rows, 5), all rows at once. Returns theta and
    the Huber losses, (rows,)."""
    theta, objective, damping = theta.copy(), np.full(len(theta), np.inf), np.full(len(theta), 1e-2)
    rows = np.arange(len(theta))  # that still improve
    for _ in range(MOST_ROUNDS):
        before = objective[rows]
        theta[rows], objective[rows], damping[rows] = descend(theta[rows], n, d, logs[rows], damping[rows])
        rows = rows[objective[rows] < (1 - TOLERANCE) * before]
        if not len(rows):
            break
    return theta, objective


def descend(
    theta: np.ndarray, n: np.ndarray, d: np.ndarray, logs: np.ndarray, damping: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROUND_STEPS steps of Levenberg and Marquardt's method, with the weights of the Huber loss; each row (rows, 5) has its
    damping, (rows,). Returns theta, the Huber losses and the damping."""
    fitted, shares = log_loss(theta, n, d)
    residuals = logs - fitted
    objective = huber(residuals)
    for _ in range(ROUND_STEPS):
        slopes = np.stack([*np.moveaxis(shares, -1, 0), -shares[..., 1] * n, -shares[..., 2] * d], axis=-1)  # (rows, runs, 5)
        weights = np.minimum(1, HUBER_DELTA / np.maximum(np.abs(residuals), 1e-300))
        weighted = (slopes * weights[..., None]).swapaxes(-1, -2)  # (rows, 5, runs)
        curvature = weighted @ slopes  # (rows, 5, 5)
        diagonal = np.einsum("rii->ri", curvature)
        diagonal = np.maximum(diagonal, 1e-9 * diagonal.max(axis=-1, keepdims=True) + 1e-300)
        damped = curvature + (damping[:, None] * diagonal)[..., None] * np.eye(PARAMETERS)
        step = np.linalg.solve(damped, weighted @ residuals[..., None])[..., 0]
        trial = theta + np.clip(step, -2, 2)
        trial[:, 3:] = np.clip(trial[:, 3:], 0, MOST_EXPONENT)
        fitted, trial_shares = log_loss(trial, n, d)
        trial_residuals = logs - fitted
        trial_objective = huber(trial_residuals)
        better = trial_objective <= objective
        damping = np.where(better, np.maximum(damping / 3, 1e-9), np.minimum(damping * 4, 1e6))
        theta, objective = np.where(better[:, None], trial, theta), np.where(better, trial_objective, objective)
        residuals = np.where(better[:, None], trial_residuals, residuals)
        shares = np.where(better[:, None, None], trial_shares, shares)
    return theta, objective, damping
