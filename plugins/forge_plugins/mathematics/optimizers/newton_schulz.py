"""Matrices with all their singular values brought to one."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Solver = Literal["newton_schulz", "svd"]

QUINTIC: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024 (Muon): steep at zero, singular values end in 0.7 - 1.2."""


def polar_factor(matrix: Tensor, solver: Solver = "newton_schulz", iterations: int = 5) -> Tensor:
    """`U V^T` of `matrix = U S V^T`: every direction that it has, equally long.

    Args:
        matrix: shape (rows, columns).
        solver: `svd` exactly, directions that are rounding errors of the others left out (the
            gradient of a softmax's layer has one);
            `newton_schulz` with a few products of matrices, singular values between about 0.7 and
            1.2 where they were above some hundredth of the matrix's norm.
        iterations: of Newton-Schulz.

    Returns:
        The same shape and dtype.
    """
    if solver == "svd":
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        noise = max(matrix.shape) * torch.finfo(torch.float32).eps
        kept = (values > values[:1] * noise).to(left)
        exact: Tensor = (left * kept) @ right
        return exact.to(matrix.dtype)
    return newton_schulz(matrix, iterations, torch.float32, 1e-30).to(matrix.dtype)


def newton_schulz(matrix: Tensor, iterations: int, dtype: torch.dtype, floor: float) -> Tensor:
    """The polar factor by products of matrices alone (see `polar_factor`).

    Args:
        matrix: shape (rows, columns); not changed.
        iterations: of the quintic.
        dtype: of the arithmetic.
        floor: least norm that the matrix is divided by.

    Returns:
        The same shape, of `dtype`.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.to(dtype)
    result = result.T if tall else result
    result = result / torch.linalg.vector_norm(result).clamp_min(floor)
    first, second, third = QUINTIC
    for _ in range(iterations):
        gram = result @ result.T
        step = torch.addmm(gram, gram, gram, beta=second, alpha=third)
        result = torch.addmm(result, step, result, beta=first)
    return result.T if tall else result
