"""Hadamard matrices, and orthogonal matrices as Kronecker products of two factors."""

from __future__ import annotations

import torch
from torch import Tensor


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q_ij = Legendre symbol of i - j modulo the prime q."""
    squares = {x * x % q for x in range(1, q)}
    symbols = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, q)])
    indices = torch.arange(q)
    return symbols[(indices[:, None] - indices[None, :]) % q].to(torch.float64)


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix float64 of +-1 by Paley's constructions (1933), None if none applies.

    I: order q + 1, q prime and 3 modulo 4 (12, 20, 44, 72, ...). II: order 2 (q + 1), q prime and
    1 modulo 4 (12, 28, 36, 76, ...).
    """
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _jacobsthal(q)
        return skew + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0] = 1, 1
        core[1:, 1:] = _jacobsthal(q)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        identity = torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(core, off) + torch.kron(identity, diagonal)
    return None


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix of a power of two, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(two, matrix)
    return matrix


def random_orthogonal(order: int, seed: int) -> Tensor:
    """Uniform over the orthogonal matrices (QR with the signs of R's diagonal), float64."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    signed: Tensor = q * r.diagonal().sign()
    return signed.contiguous()  # qr's columns are strided, which torch.kron refuses


def orthogonal_factors(order: int, seed: int) -> tuple[Tensor, Tensor, bool]:
    """Orthogonal A [a, a] and B [b, b], float64, with a b = order; B is Hadamard, b a power of two.

    ``kron(A, B)`` spreads every coordinate over all. A is Hadamard for the smallest Paley order
    that divides (12, 20, 28, 36, 44, 60, 68, 72, ...), which the third value tells; else a random
    orthogonal matrix of the odd part, and then the product is one too.
    """
    power = order & -order
    odd = order // power
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), sylvester(order) / order**0.5, True
    scale = 4
    while scale <= power:
        base = paley(odd * scale)
        if base is not None:
            rest = power // scale
            return base / len(base) ** 0.5, sylvester(rest) / rest**0.5, True
        scale *= 2
    return random_orthogonal(odd, seed), sylvester(power) / power**0.5, False


def random_signs(order: int, seed: int) -> Tensor:
    """float64 [order] of +-1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (order,), generator=generator).to(torch.float64) * 2 - 1
