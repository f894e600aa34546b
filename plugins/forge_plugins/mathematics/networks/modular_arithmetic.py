"""Tables of arithmetic modulo a prime, as sequences of tokens.

Power et al. 2022, "Grokking: Generalization Beyond Overfitting", arXiv 2201.02177, section 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Operation = Literal["add", "sub", "mul", "div"]


def is_prime(number: int) -> bool:
    """Whether a number is prime (trial division; moduli are small)."""
    if number < 2:
        return False
    divisor = 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            return False
        divisor += 1
    return True


def operation_table(operation: Operation, modulus: int) -> tuple[Tensor, Tensor]:
    """All equations `x op y = z (mod p)`.

    For `mul` and `div` y runs from 1, so that division is defined and both tables have the same
    pairs. Tokens 0 .. p-1 are numbers, p is the operator, p+1 the equals sign.

    Args:
        operation: `add`, `sub`, `mul` or `div` (x / y, that is x times the inverse of y).
        modulus: the prime p.

    Returns:
        Tokens `[x, op, y, =]` of shape (n, 4) and answers z of shape (n,), int64.

    Raises:
        ValueError: `div` modulo a number that is not prime.
    """
    if operation == "div" and not is_prime(modulus):
        raise ValueError(f"division modulo {modulus} is not defined: {modulus} is not prime")
    first = 1 if operation in ("mul", "div") else 0
    x, y = torch.meshgrid(torch.arange(modulus), torch.arange(first, modulus), indexing="ij")
    x, y = x.reshape(-1), y.reshape(-1)
    if operation == "add":
        answer = (x + y) % modulus
    elif operation == "sub":
        answer = (x - y) % modulus
    elif operation == "mul":
        answer = (x * y) % modulus
    else:
        inverses = torch.tensor([pow(int(v), -1, modulus) if v else 0 for v in range(modulus)])
        answer = (x * inverses[y]) % modulus
    operator = torch.full_like(x, modulus)
    return torch.stack([x, operator, y, operator + 1], dim=1), answer


def split_pairs(count: int, train_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random halves of `range(count)`.

    Args:
        count: number of samples.
        train_fraction: share of the first part, 0 < share < 1.
        seed: of the permutation.

    Returns:
        Indices of the training and of the validation part.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = round(count * train_fraction)
    return order[:cut], order[cut:]
