"""Winograd's convolutions: the matrices of F(m x m, 3 x 3), by the construction of Toom and Cook.

After A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016). With a matrix B the pixels
of a tile, with G the weights, with A the products: ``A^T ((G g G^T) * (B^T d B)) A`` are m x m results.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

#: Taps of the kernel, along an axis.
TAPS = 3

#: By m the points that the polynomials are evaluated at, besides infinity. In pairs of opposite signs, whose products
#: are made of the same sums; those of F(4) are such that float32 loses less than with 1 and 2 (docs/forward.md).
_POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}

Matrix = tuple[tuple[float, ...], ...]


def _product(factors: list[Fraction]) -> list[Fraction]:
    """Coefficients, the constant first, of the product of (x - factor)."""
    found = [Fraction(1)]
    for factor in factors:
        found = [a - factor * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


@cache
def matrices(m: int) -> tuple[Matrix, Matrix, Matrix]:
    """(A^T, G, B^T) of F(m): m x n, n x 3 and n x n for n = m + 2."""
    points, n = _POINTS[m], m + TAPS - 1
    a = [[point**i for point in points] + [Fraction(i == m - 1)] for i in range(m)]
    g, b = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        g.append([point**k / scale for k in range(TAPS)])
        b.append([*_product(others), Fraction(0)])
    g.append([Fraction(k == TAPS - 1) for k in range(TAPS)])
    b.append(_product(list(points)))
    assert all(len(row) == n for row in b)
    return _floats(a), _floats(g), _floats(b)


def _floats(rows: list[list[Fraction]]) -> Matrix:
    return tuple(tuple(map(float, row)) for row in rows)
