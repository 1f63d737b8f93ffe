"""Spherical methods as weighted sums: their coefficients follow from the inner products of the whole vectors.

SLERP of two vectors is c₁·v₁ + c₂·v₂ with coefficients that depend on the angle alone; nesting keeps this form. So one
pass that measures the inner products and one pass that sums are enough, whatever the size of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Gram = NDArray[np.float64]  # inner products: gram[i, j] = ⟨vᵢ, vⱼ⟩
_PARALLEL = 0.9995  # cosine beyond which a straight line is taken


def slerp(gram: Gram, t: float) -> NDArray[np.float64]:
    """Coefficients of the spherical interpolation from v₀ (t = 0) to v₁ (t = 1).

        c₀ = sin((1−t)Ω)/sin Ω,  c₁ = sin(tΩ)/sin Ω,  cos Ω = ⟨v₀,v₁⟩/(‖v₀‖‖v₁‖)

    Linear where a vector is zero or the two are (anti)parallel: |cos Ω| > 0.9995.

    Args:
        gram: 2 x 2.
        t: in [0, 1].

    Reference: Shoemake 1985; arXiv 2406.16768, section 3 (SLERP of task vectors).
    """
    norms = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    cosine = gram[0, 1] / norms if norms > 0 else 1.0
    if not abs(cosine) <= _PARALLEL:
        return np.array([1 - t, t])
    omega = math.acos(cosine)
    return np.array([math.sin((1 - t) * omega), math.sin(t * omega)]) / math.sin(omega)


def nested_slerp(gram: Gram, weights: Sequence[float]) -> NDArray[np.float64]:
    """Coefficients of the nested SLERP of several vectors: each next one is reached by its share of the weight so far.

    With equal weights the i-th vector enters with t = 1/i.

    Args:
        gram: inner products of all vectors.
        weights: one a vector, not negative, of a positive sum.

    Reference: arXiv 2406.16768, section 3 and appendix (SLERP of more than two models by iteration).
    """
    found = np.zeros(len(weights))
    found[0] = 1.0
    total = weights[0]
    for i in range(1, len(weights)):
        total += weights[i]
        if total <= 0:
            found[0], found[i] = 0.0, 1.0
            continue
        pair = np.zeros((2, len(weights)))
        pair[0], pair[1, i] = found, 1.0
        between = slerp(pair @ gram @ pair.T, weights[i] / total)
        found = between @ pair
    return found


def model_stock(gram: Gram) -> NDArray[np.float64]:
    """Coefficients of the task vectors in Model Stock.

        c = t/N each,  t = N·cos θ / (1 + (N−1)·cos θ),  cos θ the mean over pairs

    Args:
        gram: inner products of N ≥ 2 task vectors.

    Reference: arXiv 2403.19522, Eq. 7 and appendix.
    """
    n = len(gram)
    norms = np.sqrt(np.maximum(np.diag(gram), 0))
    scale = np.outer(norms, norms)
    cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    cosine = float(cosines[np.triu_indices(n, 1)].mean())
    divisor = 1 + (n - 1) * cosine
    t = n * cosine / divisor if divisor > 1e-6 else 0.0
    return np.full(n, t / n)
