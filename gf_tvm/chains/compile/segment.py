"""Segments: the element-wise operations between two convolutions of a chain, as one compiled function.

A segment reads its maps once, plane by plane, and gives everything that is wanted of it: the maps that something else
reads, in place where nobody needs what was there, and small maps, namely the means of products of derivatives over
patches, and x~ of the convolutions that read its results. No derivative is ever a map, but where a product goes on
into another segment (residual joins); then that product is handed over as one.

This is what such a function computes; :mod:`.emit_forward` makes it, where there is a compiler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..plan.graph import Shape
from ..plan.grids import Grid


@dataclass(frozen=True)
class Node:
    """One operation of a segment.

    Attributes:
        kind: "norm", "add", "scale" or a function that ``plan.elementwise.is_compiled``.
        inputs: numbers of values: a segment's maps come first, then its nodes' results.
        settings: (eps, has a scale, has a shift), (alpha,), (factor,), or the function's own.
    """

    kind: str
    inputs: tuple[int, ...]
    settings: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Part:
    """One factor of a product.

    ``what``: "derivative" of node ``of`` (of a batch norm the normalised map); "result", a function's derivative, which
    follows from its result, the value ``of``; "map", the value ``of`` itself.
    """

    what: str
    of: int
    kind: str = ""
    settings: tuple[Any, ...] = ()


#: What is averaged, or handed over: a product of these.
Product = tuple[Part, ...]


@dataclass(frozen=True)
class Average:
    """A small map: the means, or sums, of a product over the patches of a grid.

    ``layout``: "means", (n, c, ph, pw); "sums", likewise; "sums, channels last", (n, ph, pw, c).
    """

    product: Product
    grid: Grid
    layout: str = "means"


@dataclass(frozen=True)
class Segment:
    """A function on maps (n, c, h, w) of float32, and everything that its code depends on.

    Its arguments are, in this order: ``maps`` maps; mean, variance and, where there are, scale and shift of each batch
    norm, (c,); then its outputs: ``written`` and ``handed`` maps, ``averages``, and of each of ``slopes``, which are
    batch norms, the factor that it multiplies with, (c,).

    Attributes:
        shape: of all its maps.
        maps: how many it reads.
        nodes: its operations.
        written: (value, map): results that are written over a map that was read, or (None) into one of their own,
            which is an output.
    """

    shape: Shape
    maps: int
    nodes: tuple[Node, ...]
    written: tuple[tuple[int, int | None], ...]
    handed: tuple[Product, ...]
    averages: tuple[Average, ...]
    slopes: tuple[int, ...]

    @cached_property
    def key(self) -> str:
        """Readable and stable: equal exactly for equal functions."""
        n, c, h, w = self.shape
        kinds = "_".join(node.kind for node in self.nodes[:4])
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:24]
        return f"chain_forward_n{n}_c{c}_{h}x{w}_{kinds}_{digest}"

    def parameters(self) -> Iterator[tuple[int, str]]:
        """(node, "mean", "variance", "scale" or "shift") of the arguments behind the maps."""
        for k, node in enumerate(self.nodes):
            if node.kind == "norm":
                _, has_scale, has_shift = node.settings
                yield from ((k, name) for name in ("mean", "variance"))
                yield from ((k, name) for name, has in (("scale", has_scale), ("shift", has_shift)) if has)

    @cached_property
    def outputs(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arguments that it writes, those in place not among them."""
        n, c, _, _ = self.shape
        shapes: list[tuple[int, ...]] = [self.shape for _, over in self.written if over is None]
        shapes += [self.shape for _ in self.handed]
        for average in self.averages:
            ph, pw = average.grid.shape
            shapes.append((n, ph, pw, c) if average.layout == "sums, channels last" else (n, c, ph, pw))
        return (*shapes, *((c,) for _ in self.slopes))
