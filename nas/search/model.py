"""A model that guesses a figure of architectures from their features, and says how uncertain it is.

It is a Gaussian process with a Matern kernel and one length for all features, which are scaled so that the logarithms
of size count more than the others; scikit-learn finds the kernel's parameters. On 790 trained networks it is calibrated
from 20 trainings on, and more accurate than trees (docs/measurements.md, "A model of accuracy").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dtrtri
from scipy.optimize import minimize
from scipy.special import ndtr

from nas.search.features import SIZES

# Weight of the logarithms of parameters and MACs among the features.
SIZE_WEIGHT = 3.0
# The kernel's parameters are found anew from the first so many points, which costs more than all else.
MILESTONES = (10, 20, 40, 80, 160, 320)
# The kernel's parameters before they are found: variance of the signal, length, and variance of the noise.
FIRST = (1.0, 10.0, 0.2)
BOUNDS = ((1e-2, 1e2), (0.5, 100.0), (1e-4, 2.0))
# Standard deviation of the noise's logarithm around that of `FIRST`, as it is expected. By few points alone, there was
# next to no noise in a quarter of cases (docs/measurements.md, "A model of accuracy").
DOUBT_OF_NOISE = 1.0
# Values that spread less count as equal.
LEAST_DEVIATION = 1e-9


@dataclass(frozen=True)
class Scale:
    """The scale of the features of a space, from random architectures of it.

    Args:
        mean, deviation: of each feature, (f,) each.
    """

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Scale:
        return cls(features.mean(0), features.std(0))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (n, f) as the kernel takes them; those that do not vary in the space are zero."""
        varies = self.deviation > 1e-9
        scaled: np.ndarray = np.where(varies, (features - self.mean) / np.where(varies, self.deviation, 1.0), 0.0)
        scaled[:, :SIZES] *= SIZE_WEIGHT
        return scaled


@dataclass(frozen=True)
class Kernel:
    """The parameters of a kernel.

    Args:
        signal, length, noise: variance of the signal, length, and variance of the noise, of values of variance 1.
        scale: mean and standard deviation of the values by which the parameters were found, which are true on this
            scale only: the values of a search spread less and less; None stands for the scale of whatever is modelled.
    """

    signal: float
    length: float
    noise: float
    scale: tuple[float, float] | None = None

    @classmethod
    def found(cls, points: np.ndarray, values: np.ndarray) -> Kernel:
        """The parameters that are most likely with some values; the usual ones where all values are equal.

        Args:
            points: scaled features, (n, f).
            values: the figures there, (n,).
        """
        mean, deviation = float(values.mean()), float(values.std())
        if deviation < LEAST_DEVIATION:
            return cls(*FIRST)
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        signal, length, noise = FIRST
        kernel = ConstantKernel(signal, BOUNDS[0]) * Matern(length, BOUNDS[1], nu=2.5) + WhiteKernel(noise, BOUNDS[2])
        with warnings.catch_warnings():
            # A parameter at its bound is no reason to warn.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = (
                GaussianProcessRegressor(kernel, optimizer=_most_likely)
                .fit(points, (values - mean) / deviation)
                .kernel_
            )
        signal, length, noise = (float(value) for value in np.exp(fitted.theta))
        return cls(signal, length, noise, scale=(mean, deviation))

    def between(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Covariances of the signal between points, (n, m)."""
        # Computed in place, as new memory for such matrices costs more than what is computed.
        scaled: np.ndarray = one @ other.T
        scaled *= -2
        scaled += (one**2).sum(1)[:, None]
        scaled += (other**2).sum(1)
        np.maximum(scaled, 0, out=scaled)
        scaled *= 5 / self.length**2
        np.sqrt(scaled, out=scaled)
        decay = np.exp(-scaled)
        decay *= self.signal
        # 1 + scaled + scaled**2 / 3
        polynomial = scaled / 3
        polynomial += 1
        polynomial *= scaled
        polynomial += 1
        polynomial *= decay
        return polynomial


def _most_likely(
    objective: Callable[..., tuple[float, np.ndarray]], initial: np.ndarray, bounds: np.ndarray
) -> tuple[np.ndarray, float]:
    """An optimizer for scikit-learn: the greatest likelihood times that of so much noise.

    Args:
        objective: negative logarithm of the likelihood, and its gradient, at logarithms of signal, length and noise.
    """

    def penalised(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(theta, eval_gradient=True)
        away = (theta[2] - np.log(FIRST[2])) / DOUBT_OF_NOISE
        return value + away**2 / 2, gradient + np.array([0.0, 0.0, away / DOUBT_OF_NOISE])

    found = minimize(penalised, initial, method="L-BFGS-B", jac=True, bounds=bounds)
    return found.x, float(found.fun)


@dataclass(frozen=True)
class Model:
    """A Gaussian process that was given some points.

    Args:
        points: scaled features, (n, f).
        values: the figures there, (n,).
        kernel: the kernel's parameters.
        mean, deviation: the scale of the values.
        doubts: standard deviation of each value in addition to the noise, (n,); None stands for none.
        counts: number of figures, each with the noise, of which each value is the mean, (n,); None stands for one.
    """

    points: np.ndarray
    values: np.ndarray
    kernel: Kernel
    mean: float
    deviation: float
    doubts: np.ndarray | None = None
    counts: np.ndarray | None = None

    @classmethod
    def of(cls, points: np.ndarray, values: np.ndarray, kernel: Kernel, counts: np.ndarray | None = None) -> Model:
        """The model of some points, on the scale of its kernel, or else on that of the values."""
        mean, deviation = kernel.scale or (float(values.mean()), float(values.std()))
        return cls(points, values, kernel, mean, max(deviation, LEAST_DEVIATION), counts=counts)

    def with_more(self, points: np.ndarray, values: np.ndarray, doubts: np.ndarray | None = None) -> Model:
        """The model with more points, on the same scale."""
        joined = np.concatenate([self.points, points]), np.concatenate([self.values, values])
        added = np.concatenate([self._doubts, np.zeros(len(values)) if doubts is None else doubts])
        counts = None if self.counts is None else np.concatenate([self.counts, np.ones(len(values))])
        return replace(self, points=joined[0], values=joined[1], doubts=added, counts=counts)

    @property
    def noise(self) -> float:
        """Standard deviation of a single value around the truth."""
        return float(np.sqrt(self.kernel.noise)) * self.deviation

    @property
    def _doubts(self) -> np.ndarray:
        return np.zeros(len(self.values)) if self.doubts is None else self.doubts

    @property
    def _own_variance(self) -> np.ndarray:
        """Variance of each value around the truth, (n,), where that of all values is 1."""
        noise = self.kernel.noise / (1 if self.counts is None else self.counts)
        variance: np.ndarray = noise + (self._doubts / self.deviation) ** 2 + 1e-9
        return variance

    def like(self, values: np.ndarray) -> Model:
        """The model of other figures at the same points on their own scale, with the same kernel on it.

        Where all values have the same noise, nothing is computed anew but the values' weights.
        """
        found = Model.of(self.points, values, replace(self.kernel, scale=None))
        if self.doubts is None and self.counts is None:
            found.__dict__.update(
                {name: self.__dict__[name] for name in ("_factor", "_precision") if name in self.__dict__}
            )
        return found

    @cached_property
    def _factor(self) -> np.ndarray:
        """The Cholesky factor of the values' covariance, (n, n)."""
        covariance = self.kernel.between(self.points, self.points)
        covariance[np.diag_indices_from(covariance)] += self._own_variance
        return np.linalg.cholesky(covariance)

    @cached_property
    def _precision(self) -> np.ndarray:
        """The diagonal of the inverse of the values' covariance, (n,)."""
        inverse, _ = dtrtri(self._factor, lower=1)
        precision: np.ndarray = (inverse**2).sum(0)
        return precision

    @cached_property
    def _weights(self) -> np.ndarray:
        """The values' weights, (n,)."""
        weights: np.ndarray = cho_solve((self._factor, True), (self.values - self.mean) / self.deviation)
        return weights

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the truth at some points, (m,) each."""
        across = self.kernel.between(points, self.points)
        explained = solve_triangular(self._factor, across.T, lower=True)
        variance = np.maximum(self.kernel.signal - (explained**2).sum(0), 1e-9)
        return self.mean + self.deviation * (across @ self._weights), self.deviation * np.sqrt(variance)

    def means(self, points: np.ndarray) -> np.ndarray:
        """Mean of the truth at some points, (m,), without what tells how uncertain it is."""
        found: np.ndarray = self.mean + self.deviation * (self.kernel.between(points, self.points) @ self._weights)
        return found

    def fitted(self) -> np.ndarray:
        """Mean of the truth at the model's own points, (n,)."""
        # As the covariance of the signal lacks the noise alone, no kernel is needed for it.
        found: np.ndarray = self.values - self.deviation * self._own_variance * self._weights
        return found

    def below(self, points: np.ndarray, bound: float) -> np.ndarray:
        """The probability that a value at each point is below a bound, (m,)."""
        return self.chance_below(*self.predict(points), bound)

    def chance_below(self, mean: np.ndarray, deviation: np.ndarray, bound: float) -> np.ndarray:
        """The probability that a value is below a bound where the truth was predicted, (m,)."""
        probability: np.ndarray = ndtr((bound - mean) / np.hypot(deviation, self.noise))
        return probability

    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each value, guessed from all others, (n,) each.

        (Rasmussen and Williams, Gaussian Processes for Machine Learning, equation 5.12.)
        """
        return (
            self.values - self.deviation * self._weights / self._precision,
            self.deviation / np.sqrt(self._precision),
        )


def kernel_for(points: np.ndarray, values: np.ndarray, known: dict[int, Kernel]) -> Kernel:
    """The kernel for some points: that of the greatest milestone that they have passed.

    It depends on the first points alone, so that a search that goes on has the same.

    Args:
        known: the kernels of milestones, to which a new one is added.
    """
    passed = [milestone for milestone in MILESTONES if milestone <= len(values)]
    if not passed:
        return Kernel(*FIRST)
    count = passed[-1]
    if count not in known:
        known[count] = Kernel.found(points[:count], values[:count])
    return known[count]
