"""Hadamard matrices, and orthogonal matrices as Kronecker products of two factors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

LARGEST = 512  # of a Paley matrix in a product: beyond it a random one of the odd part costs less


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) where q = p^k, p prime and k at most 3."""
    roots = ((round(q ** (1 / k)), k) for k in (1, 2, 3) if q > 1)
    return next(((p, k) for p, k in roots if p**k == q and _is_prime(p)), None)


def _irreducible(p: int, k: int) -> Tensor:
    """r [k], lowest power first, such that x^k - r(x) is irreducible over GF(p); k at most 3.

    Up to degree 3 a polynomial without a root is.
    """
    for r in itertools.product(range(p), repeat=k):
        if k == 1 or all((x**k - sum(c * x**i for i, c in enumerate(r))) % p for x in range(p)):
            return torch.tensor(r)
    raise AssertionError(f"GF({p}^{k}) exists")


def _jacobsthal(q: int) -> Tensor:
    """Q_ij = 0 for i = j, else 1 where the difference of elements i and j of GF(q) is a square,
    else -1; element i is the polynomial whose coefficients are the digits of i to the base p."""
    factors = _prime_power(q)
    assert factors is not None
    p, k = factors
    places = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // places % p
    squares = torch.zeros(q, 2 * k - 1, dtype=torch.int64)
    for i, j in itertools.product(range(k), repeat=2):
        squares[:, i + j] += digits[:, i] * digits[:, j]
    rule = _irreducible(p, k)
    for degree in range(2 * k - 2, k - 1, -1):
        squares[:, degree - k : degree] += squares[:, degree : degree + 1] * rule
    symbols = -torch.ones(q, dtype=torch.float64)
    symbols[squares[:, :k] % p @ places] = 1
    symbols[0] = 0
    return symbols[(digits[:, None] - digits[None]) % p @ places]


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix float64 of +-1 by Paley's constructions (1933), None if none applies.

    I: order q + 1, q 3 modulo 4 (12, 20, 44, 72, ...). II: order 2 (q + 1), q 1 modulo 4 (12, 28,
    36, 76, ...). q is a prime, its square or its cube (344 = 7^3 + 1).
    """
    q = order - 1
    if q % 4 == 3 and _prime_power(q):
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _jacobsthal(q)
        return skew + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _prime_power(q):
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
    """Orthogonal A [a, a] and B [b, b], float64, with a b = order and a + b as small as can be.

    ``kron(A, B)`` spreads every coordinate over all. It is Hadamard where a Paley order of at most
    ``LARGEST`` divides (12, 20, 28, 36, 44, 60, 68, 72, ...) and leaves a power of two, which the
    third value tells; else A has a random orthogonal matrix of the odd part in it.
    """
    base = _odd_part(order)
    hadamard = base is not None
    if base is None:
        base = random_orthogonal(order // (order & -order), seed)
    else:
        base = base / len(base) ** 0.5
    # Sylvester's matrices factor freely, so they are split where the two products cost least.
    power = order // len(base)
    splits = [2**k for k in range(power.bit_length())]
    left = min(splits, key=lambda k: len(base) * k + power // k)
    right = power // left
    return torch.kron(base, sylvester(left) / left**0.5), sylvester(right) / right**0.5, hadamard


def _odd_part(order: int) -> Tensor | None:
    """The smallest Hadamard matrix of +-1 that leaves a power of two of ``order``, if any."""
    power = order & -order
    odd = order // power
    if odd == 1:
        return sylvester(1)
    scales = (2**k for k in range(2, power.bit_length()) if odd * 2**k <= LARGEST)
    return next((found for k in scales if (found := paley(odd * k)) is not None), None)


def random_signs(order: int, seed: int) -> Tensor:
    """float64 [order] of +-1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (order,), generator=generator).to(torch.float64) * 2 - 1
