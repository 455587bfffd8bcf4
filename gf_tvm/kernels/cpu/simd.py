"""Vectors of float32 lanes in TVM's IR: loads, stores, picks, and what the compiler has to be told in LLVM's words.

Used inside of an :class:`tvm.script.ir_builder.IRBuilder`. Buffers are flat; tensors of 16 bits are converted as they
are loaded and stored. Only powers of two: TVM takes other vectors apart lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..stages import ACC

#: Bytes of a cache line, on every CPU that there is a profile for.
LINE = 64


def vector(kind: str, lanes: int) -> str:
    """TVM's name of a vector type."""
    return kind if lanes == 1 else f"{kind}x{lanes}"


#: Storage dtypes by the type of the elements that loads and stores see. TVM 0.27 converts vectors of bfloat16 as if
#: they were integers, so their bits are handled here.
_STORAGE = {"bfloat16": "uint16"}


def kind_of(buffer: Any) -> str:
    """The type of a buffer's elements."""
    return str(buffer.dtype)


def flat(buffer: Any) -> Any:
    """The same memory with one axis."""
    shape = [int(extent) for extent in buffer.shape]
    kind = kind_of(buffer)
    return T.decl_buffer((prod(shape),), _STORAGE.get(kind, kind), data=buffer.data)


def _index(offset: Any, lanes: int) -> Any:
    return offset if lanes == 1 else tirx.Ramp(offset, 1, lanes)


def load(buffer: Any, offset: Any, lanes: int) -> Any:
    """``lanes`` neighbouring elements as float32."""
    value = tirx.BufferLoad(buffer, [_index(offset, lanes)])
    if kind_of(buffer) == ACC:
        return value
    if kind_of(buffer) != "uint16":
        return tirx.Cast(vector(ACC, lanes), value)
    bits = tirx.Cast(vector("uint32", lanes), value) << bit_pattern(16, lanes)
    return tirx.reinterpret(vector(ACC, lanes), bits)


def bit_pattern(value: int, lanes: int) -> Any:
    """An unsigned integer in every lane."""
    scalar = tirx.const(value, "uint32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def converted(buffer: Any, value: Any) -> Any:
    """A float32 vector as elements of ``buffer``."""
    lanes = lanes_of(value)
    if kind_of(buffer) == ACC:
        return value
    if kind_of(buffer) != "uint16":
        return tirx.Cast(vector(kind_of(buffer), lanes), value)
    # bfloat16: the upper half, rounded to nearest, ties to even; NaN stays NaN, whatever its bits.
    value = T.bind(value)
    bits = T.bind(tirx.reinterpret(vector("uint32", lanes), value))
    odd = (bits >> bit_pattern(16, lanes)) & bit_pattern(1, lanes)
    rounded = (bits + bit_pattern(0x7FFF, lanes) + odd) >> bit_pattern(16, lanes)
    kept = tirx.Select(tirx.NE(value, value), bit_pattern(0x7FC0, lanes), rounded)
    return tirx.Cast(vector("uint16", lanes), kept)


def lanes_of(value: Any) -> int:
    """Lanes of a value; 1 for a scalar."""
    return int(tvm.DataType(str(value.ty.dtype)).lanes)


def store(buffer: Any, offset: Any, value: Any) -> None:
    """Write a float32 vector."""
    T.buffer_store(buffer, converted(buffer, value), [_index(offset, lanes_of(value))])


def splat(value: Any, lanes: int) -> Any:
    """A scalar in every lane."""
    value = tirx.const(value, ACC) if isinstance(value, (int, float)) else value
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def numbers(like: Any) -> Callable[[float], Any]:
    """A function that gives a number in as many lanes as ``like`` has."""
    lanes = lanes_of(like)
    return lambda value: splat(float(value), lanes)


def pick(vectors: Sequence[Any], lanes: Sequence[int | None]) -> Any:
    """A vector made of lanes of others, counted through them; None is zero.

    Only those that are needed take part: shuffles of two registers are one instruction, of more they are several.
    """
    width = lanes_of(vectors[0])
    used = sorted({lane // width for lane in lanes if lane is not None})
    if not used:
        return splat(0.0, len(lanes))
    place = {k: at * width for at, k in enumerate(used)}
    sources = [vectors[k] for k in used]
    zero = len(sources) * width
    if None in lanes:
        sources.append(splat(0.0, width))
    if len(sources) == 1 and list(lanes) == list(range(width)):
        return sources[0]
    if width == 1 and len(set(lanes)) == 1:
        return splat(sources[0], len(lanes))
    indices = [zero if lane is None else place[lane // width] + lane % width for lane in lanes]
    if len(indices) == 1 and width == 1:
        return sources[indices[0]]
    # TVM wants no more lanes of a shuffle than went into it.
    while len(sources) * width < len(indices):
        sources.append(sources[0])
    return tirx.Shuffle(sources, [tirx.IntImm("int32", index) for index in indices])


def prefetch(buffer: Any, offset: Any) -> None:
    """Ask for the cache line of an element to be brought into L2. Harmless for any address."""
    address = tirx.address_of(tirx.BufferLoad(buffer, [offset]))
    read, l2, data = (tirx.IntImm("int32", value) for value in (0, 2, 1))
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, l2, data))


_STREAM = """
define {linkage}void @{name}(ptr %to, <{lanes} x {kind}> %value) alwaysinline nounwind {{
  store <{lanes} x {kind}> %value, ptr %to, align {bytes}, !nontemporal !0
  ret void
}}
"""
_FENCE = """
define {linkage}void @gf_tvm_fence() alwaysinline nounwind {{
  fence seq_cst
  ret void
}}
!0 = !{{i32 1}}
"""
_LLVM_KINDS = {"float32": "float", "float16": "half", "uint16": "i16"}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint16": 2}


def item_bytes(kind: str) -> int:
    """Size of a tensor's element in memory."""
    return _ITEM_BYTES[kind]


def _stream_name(kind: str, lanes: int) -> str:
    return f"gf_tvm_stream_{kind}x{lanes}"


@contextmanager
def streaming(kind: str, wanted: bool = True, shared: bool = False) -> Iterator[None]:
    """Inside, if ``wanted``, :func:`stream` and :func:`fence` can be used: TVM has no such stores, LLVM has.

    ``shared``: other functions of the module say the same.
    """
    if not wanted:
        yield
        return
    kind = _STORAGE.get(kind, kind)
    widths = [lanes for lanes in (2, 4, 8, 16, 32) if 16 <= lanes * _ITEM_BYTES[kind] <= LINE]
    linkage = "linkonce_odr " if shared else ""
    text = "".join(
        _STREAM.format(
            linkage=linkage,
            name=_stream_name(kind, lanes),
            lanes=lanes,
            kind=_LLVM_KINDS[kind],
            bytes=lanes * _ITEM_BYTES[kind],
        )
        for lanes in widths
    )
    with T.attr(tirx.IntImm("int32", 0), "pragma_import_llvm", text + _FENCE.format(linkage=linkage)):
        yield


def can_stream(kind: str, lanes: int) -> bool:
    """Whether a vector is one that :func:`stream` knows: 16 bytes to a cache line."""
    return 16 <= lanes * _ITEM_BYTES[kind] <= LINE


def stream(buffer: Any, offset: Any, value: Any) -> None:
    """Write a vector past the caches, to an address that is a multiple of its size.

    A plain store reads the line that it writes to; a sweep over memory then moves half as much again.
    """
    value = converted(buffer, value)
    name = _stream_name(kind_of(buffer), lanes_of(value))
    address = tirx.address_of(tirx.BufferLoad(buffer, [offset]))
    T.evaluate(tirx.call_extern("void", name, address, value))


def write(buffer: Any, offset: Any, value: Any, past_caches: bool) -> None:
    """:func:`stream` where that is wanted and the vector is one that it knows, else :func:`store`."""
    streams = past_caches and can_stream(kind_of(buffer), lanes_of(value))
    (stream if streams else store)(buffer, offset, value)


def fence() -> None:
    """Before another thread reads what was streamed."""
    T.evaluate(tirx.call_extern("void", "gf_tvm_fence"))
