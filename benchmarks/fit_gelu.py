"""Coefficients of GELU's erf form in csrc/semantics.cuh: ``python -m benchmarks.fit_gelu``.

gelu(y) = y Phi(y) and Phi(y) = 1 / (1 + 2^(-t)), t = log2(Phi(y) / Phi(-y)) odd in y: t = y q(y^2). The polynomial q is
fitted to the smallest largest error of gelu on [-6, 6]; beyond, any large t gives 0 and y. Least squares whose weights
grow where the error is large (Lawson) approach it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

DEGREE = 6  # in y^2: 7e-8, below the rounding of float32; degree 5 is 6e-7
LARGEST = 6.0
ROUNDS = 300


def fit(degree: int = DEGREE) -> tuple[NDArray[np.float64], float]:
    """Coefficients of q, of the highest power first, and the largest error of gelu."""
    points = (np.cos(np.pi * (np.arange(4000) + 0.5) / 4000) + 1) * LARGEST / 2
    wanted = (log_ndtr(points) - log_ndtr(-points)) / np.log(2) / points
    below = ndtr(points)
    slope = points**2 * below * (1 - below) * np.log(2)  # of gelu by q
    powers = np.vander(points**2, degree + 1)
    weights = slope.copy()
    for _ in range(ROUNDS):
        found = np.linalg.lstsq(powers * weights[:, None], wanted * weights, rcond=None)[0]
        error = np.abs(powers @ found - wanted) * slope
        weights *= np.sqrt(error / error.max() + 1e-3)
        weights = np.maximum(weights / weights.max(), 1e-9 * slope)
    return found, float(error.max())


if __name__ == "__main__":
    coefficients, largest = fit()
    print(*(f"{np.float32(c):.8g}" for c in coefficients), f"error {largest:.2g}", sep="\n")
