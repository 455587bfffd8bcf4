"""exp, tanh and erf of float32 vectors in TVM's IR: LLVM would call the C library lane by lane.

Polynomials were fitted for the least largest error (Lawson's iteration, 2000 points). The errors named are against
float64, rounding included; the tests hold the functions to them. NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..stages import ACC
from . import simd

#: 1.5 * 2^23: added to a small integer it leaves that integer in the lowest bits.
_INTEGER = 12582912.0
_LOG2_E = 1.4426950408889634
#: ln 2 in two parts, of which the first has so few digits that its multiples are exact.
_LN2 = 0.693145751953125, 1.4286068203094172e-06
#: Beyond these exp is as good as zero, or near the largest float32.
_LEAST, _MOST = -87.0, 88.0

#: (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2.
_EXP = 0.5, 0.166665181517601, 0.04166620597243309, 0.008368954062461853, 0.0013950599823147058
#: (tanh(z) / z - 1) / z^2 of z^2, for |z| <= 0.625.
_TANH = -0.3333328068256378, 0.13331425189971924, -0.05373761057853699, 0.020630402490496635, -0.005693510174751282
#: erf(x) / x of x^2, for |x| <= 1.
_ERF = (
    *(1.1283791065216064, -0.3761260509490967, 0.112834133207798, -0.026847949251532555, 0.0051785740070044994),
    *(-0.0007932118605822325, 7.613084017066285e-05),
)
#: log(1 - erf(x)) of x, for 1 <= x <= 4; beyond, erf is 1 in float32.
_LOG_ERFC = (
    *(-0.0003326823643874377, -1.1271225214004517, -0.6380935311317444, -0.10314801335334778, 0.021856334060430527),
    *(-0.002951882779598236, 0.00018677761545404792),
)


def exp(x: Any) -> Any:
    """Of ``x`` between -87 and 88, of the nearer limit beyond; relative error 2e-7."""
    number, lanes = simd.numbers(x), simd.lanes_of(x)
    x = kept(tirx.Select(tirx.LT(x, number(_LEAST)), number(_LEAST), x))
    x = kept(tirx.Select(tirx.GT(x, number(_MOST)), number(_MOST), x))
    power = kept(tirx.floor(x * number(_LOG2_E) + number(0.5)))
    rest = kept(x - power * number(_LN2[0]) - power * number(_LN2[1]))
    value = kept(polynomial(_EXP, rest) * (rest * rest) + rest + number(1))
    # 2^power by its bits. A conversion to integers would leave open what becomes of NaN.
    bits = tirx.reinterpret(simd.vector("uint32", lanes), power + number(_INTEGER))
    exponent = (bits + simd.bit_pattern(127, lanes)) << simd.bit_pattern(23, lanes)
    return value * tirx.reinterpret(simd.vector(ACC, lanes), exponent)


def tanh(z: Any) -> Any:
    """Relative error 3e-7."""
    number = simd.numbers(z)
    square, size = kept(z * z), kept(_signed(z, z))
    near = z + z * (square * polynomial(_TANH, square))
    far = number(1) - number(2) / (exp(size + size) + number(1))
    return kept(tirx.Select(tirx.LT(size, number(0.625)), near, _signed(far, z)))


def erf(x: Any) -> Any:
    """Relative error 3e-7."""
    number = simd.numbers(x)
    square, size = kept(x * x), kept(_signed(x, x))
    near = x * polynomial(_ERF, square)
    short = kept(tirx.Select(tirx.GT(size, number(4)), number(4), size))
    far = number(1) - exp(polynomial(_LOG_ERFC, short))
    return kept(tirx.Select(tirx.LT(size, number(1)), near, _signed(far, x)))


def kept(value: Any) -> Any:
    """``value`` in a register. TVM would write out a bound expression wherever it is used, here some thousand times."""
    lanes = simd.lanes_of(value)
    register = T.alloc_buffer((lanes,), ACC, scope="local")
    simd.store(register, 0, value)
    return simd.load(register, 0, lanes)


def polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """The sum of coefficients[k] * x^k."""
    number = simd.numbers(x)
    value = number(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = kept(value * x + number(coefficient))
    return value


def _signed(value: Any, x: Any) -> Any:
    """``value``, or minus that where x is negative."""
    zero = simd.numbers(x)(0)
    return tirx.Select(tirx.LT(x, zero), zero - value, value)
