"""The gradient algebra: carries gradients backwards through a region as sums of terms, and writes down the steps.

A *term* is a map on a patch grid times a full-size factor that the forward pass knows: the product of the derivatives
of the element-wise operations that the gradient met since it left its convolution. A convolution needs only the
term's mean over its own patches, which is the map times the factor's mean over the cells that both grids share; so of
every factor that some convolution needs, the forward pass keeps these means and nothing else.

The same pass finds out whether a region can be carried out so at all; what stands in the way is returned as problems.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .graph import (
    Add,
    Cat,
    Conv,
    Drop,
    Gate,
    Map,
    Norm,
    Op,
    Pad,
    Pool,
    Region,
    Resize,
    Scale,
    Shape,
    Slice,
    View,
    WindowPool,
)
from .grids import Cuts, Grid, fits, pixels, shared
from .sampling import Back, Sampling
from .steps import (
    Channels,
    ConvInput,
    ConvWeight,
    Expand,
    Filter,
    Gather,
    MapSum,
    Part,
    PatchSum,
    Plus,
    Step,
    Take,
    Times,
    TimesSaved,
)

#: Operations whose derivatives (of a batch norm the normalised map, of a gate its input) are multiplied, each with the
#: channel of its map that is the factor's first one; in the order of execution. One of ``Resampling`` among them stands
#: for the product of those before it, taken through it.
Factor = tuple[tuple[int, int], ...]

#: Operations that move pixels, or make them from several.
Resampling = (Pad, WindowPool, Resize)

#: More terms than that at one value are not worth their means: a chain of k residual blocks needs k (k + 1) / 2.
MAX_TERMS = 8


@dataclass(frozen=True)
class Term:
    """A gradient: a register on ``grid``, for the channels ``start`` and following of a value, times a factor.

    ``grid`` cuts the map of the factor's last operation. Where the factor has others of ``Resampling``, what is between
    that map and the value, the gradient is that product taken back through them.
    """

    register: int
    grid: Grid
    factor: Factor
    start: int
    width: int


@dataclass(frozen=True)
class Mean:
    """What the forward pass averages: a product of derivatives over each patch (or cell) of a grid."""

    factor: Factor
    width: int
    grid: Grid


@dataclass(frozen=True)
class Kept:
    """Something else that the forward pass keeps for an operation.

    ``what``: "x~", the filtered input; "weight"; "scale", of a batch norm; "gate", the second factor.
    """

    op: int
    what: str


@dataclass
class Lowered:
    """The steps of a backward pass, the sizes of their registers, what has to be kept, and what stands in the way."""

    steps: list[Step] = field(default_factory=list)
    registers: list[tuple[int, int, int]] = field(default_factory=list)  # channels, ph, pw
    slots: list[Mean | Kept] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)  # value -> why its gradient must have full size


@dataclass(frozen=True)
class Situation:
    """What a region looks like in one training step.

    Attributes:
        shapes: of all values (None: unknown, then its operation is plain).
        needs: whether a value's gradient is needed.
        trained: the region's tensors whose gradients are needed.
        full: values whose gradient has full size, and why.
        plain: operations that run as in the network, outside of every chain.
        taken: values that are used outside of the region.
    """

    shapes: Sequence[Shape | None]
    needs: Sequence[bool]
    trained: frozenset[int]
    full: Mapping[int, str]
    plain: Collection[int]
    taken: Collection[int]

    def shape(self, value: int) -> Shape:
        """Of a value that has one."""
        shape = self.shapes[value]
        assert shape is not None
        return shape

    def small(self, value: int) -> bool:
        """Whether a value's map is one pixel: then its gradient is on every grid."""
        shape = self.shapes[value]
        return shape is not None and shape[2:] == (1, 1)


def lower(region: Region, situation: Situation, ops: Collection[int]) -> Lowered:
    """Carry gradients backwards through the operations ``ops`` of a region, none of which is plain."""
    return _Lowering(region, situation, ops).run()


class _Lowering:
    def __init__(self, region: Region, situation: Situation, ops: Collection[int]) -> None:
        self.region, self.at, self.ops = region, situation, frozenset(ops)
        self.out = Lowered()
        self.terms: dict[int, list[Term]] = {}
        self.slot_of: dict[Mean | Kept, int] = {}

    def run(self) -> Lowered:
        for i in sorted(self.ops, reverse=True):
            op, value = self.region.ops[i], self.region.result(i)
            if not self.at.needs[value]:
                continue
            self._incoming(i, op, value)
            terms = self.terms.get(value, [])
            if len(terms) > MAX_TERMS:
                self.out.problems.setdefault(value, f"at {op.name} more than {MAX_TERMS} products of derivatives meet")
            self._backward(i, op, terms)
        for value in [v for v in self.terms if self._outside(v)]:
            self._leave(value)
        return self.out

    # Gradients that come in, and that leave

    def _outside(self, value: int) -> bool:
        """Whether the chain does not compute this value, or hands it out as a map of its own."""
        return value < self.region.entries or value in self.at.full or value - self.region.entries not in self.ops

    def _incoming(self, i: int, op: Op, value: int) -> None:
        users = [j for j, other in enumerate(self.region.ops) if value in other.inputs and j not in self.ops]
        if value in self.at.full or not (value in self.at.taken or users):
            return
        # Of a map with more than one pixel the gradient would have full size, and the value would be listed so.
        if self.at.small(value):
            _, c, _, _ = self.at.shape(value)
            grid = Grid.whole((1, 1))
            dst = self._register(c, grid)
            self.out.steps.append(Take(dst, value))
            self._add(value, Term(dst, grid, (), 0, c))

    def _leave(self, value: int) -> None:
        terms = self.terms[value]
        if self.at.small(value):
            c, grid = self.at.shape(value)[1], Grid.whole((1, 1))
            gathered = self._gather(value, value, terms, grid, c)
            if gathered is not None:
                self.out.steps.append(Expand(value, gathered, grid, 0, c))
            return
        for term in terms:
            self.out.steps.append(Expand(value, term.register, term.grid, term.start, term.width))

    # Bookkeeping

    def _register(self, channels: int, grid: Grid) -> int:
        self.out.registers.append((channels, *grid.shape))
        return len(self.out.registers) - 1

    def _slot(self, what: Mean | Kept) -> int:
        if what not in self.slot_of:
            self.slot_of[what] = len(self.out.slots)
            self.out.slots.append(what)
        return self.slot_of[what]

    def _mean(self, factor: Factor, width: int, grid: Grid) -> int | None:
        while factor and isinstance(self.region.ops[factor[0][0]], Resampling):
            factor = factor[1:]  # nothing to be taken through it: what is one is one behind it
        return self._slot(Mean(factor, width, grid)) if factor else None

    def _add(self, value: int, term: Term) -> None:
        """Add a term to a value's gradient; terms that differ in their map only become one."""
        terms = self.terms.setdefault(value, [])
        for k, other in enumerate(terms):
            if replace(other, register=term.register) == term:
                dst = self._register(term.width, term.grid)
                self.out.steps.append(Plus(dst, other.register, term.register))
                terms[k] = replace(term, register=dst)
                return
        terms.append(term)

    def _deliver(self, i: int, value: int, term: Term) -> None:
        """Hand a term to an input of operation ``i``."""
        if not self.at.needs[value]:
            return
        if term.factor and self._outside(value) and not self.at.small(value):
            reason = self.at.full.get(value, f"{self._name(value)} needs a gradient of full size")
            self.out.problems.setdefault(self.region.result(i), reason)
            return
        self._add(value, term)

    def _name(self, value: int) -> str:
        if value < self.region.entries:
            names = self.region.entry_names
            return names[value] if value < len(names) else f"entry {value}"
        return self.region.ops[value - self.region.entries].name

    def _gather(self, value: int, blame: int, terms: Sequence[Term], grid: Grid, channels: int) -> int | None:
        """The register with the sum of all terms, averaged over the patches of ``grid``."""
        parts = []
        for term in terms:
            image = self._image(grid, term.factor)
            if image is None:
                reason = f"patches at {self._name(value)} do not fit the windows of what comes after it"
                self.out.problems.setdefault(blame, reason)
                continue
            if not fits(image, term.grid):
                (ah, aw), (bh, bw) = grid.shape, term.grid.shape
                _, _, h, w = self.at.shape(value)
                self.out.problems.setdefault(
                    blame,
                    f"at {self._name(value)} a grid of {ah}x{aw} patches and one of {bh}x{bw} cut the {h}x{w} map "
                    "in different places",
                )
                continue
            rows, cols = shared(image.rows, term.grid.rows), shared(image.cols, term.grid.cols)
            cells = Grid(rows.cells, cols.cells)
            identical = cells == grid == term.grid
            if identical and not term.factor and len(terms) == 1 and (term.start, term.width) == (0, channels):
                return term.register
            shares = [_shares(cuts, s.cells, s.in_a) for cuts, s in ((grid.rows, rows), (grid.cols, cols))]
            if all(len(set(axis)) == 1 for axis in shares) and cells == image == term.grid:
                # Equal for all patches: together with what is element-wise, not cell by cell.
                term = self._times(term, shares[0][0] * shares[1][0])
                shares = [(1.0,) * len(axis) for axis in shares]
            mean = self._mean(term.factor, term.width, cells)
            parts.append(Part(term.register, mean, term.start, term.width, rows, cols, shares[0], shares[1]))
        if not parts:
            return None
        dst = self._register(channels, grid)
        self.out.steps.append(Gather(dst, channels, grid, tuple(parts)))
        return dst

    def _image(self, grid: Grid, factor: Factor) -> Grid | None:
        """The patches of a value, on the map of the last operation of a factor of its gradient.

        None where that needs windows that lie in two patches.
        """
        for i, _ in factor:
            along = self._along(self.region.ops[i])
            if along is None:
                continue
            rows, cols = (axis.image(cuts) for axis, cuts in zip(along, (grid.rows, grid.cols), strict=True))
            if rows is None or cols is None:
                return None
            grid = Grid(rows, cols)
        return grid

    def _along(self, op: Op) -> tuple[Sampling, Sampling] | None:
        return op.along(self.at.shape(op.inputs[0])) if isinstance(op, Resampling) else None

    # One operation

    def _backward(self, i: int, op: Op, terms: list[Term]) -> None:
        if isinstance(op, Conv):
            self._conv(i, op, terms)
        elif isinstance(op, Map):
            for term in terms:
                factor = tuple(sorted(((i, term.start), *term.factor)))
                self._deliver(i, op.inputs[0], replace(term, factor=factor))
        elif isinstance(op, Norm):
            self._norm(i, op, terms)
        elif isinstance(op, Gate):
            self._gate(i, op, terms)
        elif isinstance(op, Drop):
            for term in terms:
                if self.at.needs[op.inputs[0]]:
                    self._deliver(i, op.inputs[0], self._times_saved(term, Kept(i, "gate")))
        elif isinstance(op, View):
            for term in terms:
                self._deliver(i, op.inputs[0], term)
        elif isinstance(op, Scale):
            for term in terms:
                self._deliver(i, op.inputs[0], self._times(term, op.factor))
        elif isinstance(op, Add):
            for term in terms:
                self._deliver(i, op.inputs[0], term)
                if self.at.needs[op.inputs[1]]:
                    self._deliver(i, op.inputs[1], self._times(term, op.alpha))
        elif isinstance(op, Cat):
            self._cat(i, op, terms)
        elif isinstance(op, Slice):
            for term in terms:
                self._deliver(i, op.inputs[0], replace(term, start=term.start + op.start))
        elif isinstance(op, Pool):
            self._pool(i, op, terms)
        elif isinstance(op, Resize) and (self.at.small(op.inputs[0]) or op.along(self.at.shape(op.inputs[0])) is None):
            self._resize(i, op, terms)
        elif isinstance(op, Resampling):
            self._resample(i, op, terms)
        else:
            raise AssertionError(f"no rule for {op}")

    def _conv(self, i: int, op: Conv, terms: list[Term]) -> None:
        x, y = op.inputs[0], self.region.result(i)
        geometry = op.geometry(self.at.shape(x))
        grid = Grid.of_output(geometry)
        if y in self.at.full:
            g: int | None = self._register(geometry.co, grid)
            assert g is not None
            self.out.steps.append(Filter(g, y, geometry))
        else:
            g = self._gather(y, y, terms, grid, geometry.co)
        if g is None:
            return
        weight, bias = op.tensors
        if weight in self.at.trained:
            assert weight is not None
            self.out.steps.append(ConvWeight(weight, g, self._slot(Kept(i, "x~")), geometry, op.library))
        if bias is not None and bias in self.at.trained:
            self.out.steps.append(PatchSum(bias, geometry.co, g, None, 0, geometry.co, grid))
        if self.at.needs[x]:
            inside = Grid.of_input(geometry)
            dst = self._register(geometry.ci, inside)
            self.out.steps.append(ConvInput(dst, g, self._slot(Kept(i, "weight")), geometry, op.library))
            self._deliver(i, x, Term(dst, inside, (), 0, geometry.ci))

    def _norm(self, i: int, op: Norm, terms: list[Term]) -> None:
        _, _, scale, shift = op.tensors
        channels = self.at.shape(op.inputs[0])[1]
        for term in terms:
            if scale is not None and scale in self.at.trained:
                normalised = tuple(sorted(((i, term.start), *term.factor)))
                mean = self._mean(normalised, term.width, term.grid)
                self.out.steps.append(PatchSum(scale, channels, term.register, mean, term.start, term.width, term.grid))
            if shift is not None and shift in self.at.trained:
                mean = self._mean(term.factor, term.width, term.grid)
                self.out.steps.append(PatchSum(shift, channels, term.register, mean, term.start, term.width, term.grid))
            if self.at.needs[op.inputs[0]]:
                self._deliver(i, op.inputs[0], self._times_saved(term, Kept(i, "scale")))

    def _gate(self, i: int, op: Gate, terms: list[Term]) -> None:
        x = op.inputs[0]
        second = op.inputs[1] if len(op.inputs) == 2 else None
        trained = self.at.needs[second] if second is not None else op.tensors[0] in self.at.trained
        if trained and second is not None and self.at.shape(second)[1] != self.at.shape(x)[1]:
            self.out.problems.setdefault(self.region.result(i), f"{op.name} needs the gradient of a sum over channels")
            return
        for term in terms:
            if trained:
                mean = self._mean(tuple(sorted(((i, term.start), *term.factor))), term.width, term.grid)
                assert mean is not None
                batch = second is None or self.at.shape(second)[0] == 1
                if second is None:
                    tensor = op.tensors[0]
                    assert tensor is not None
                    channels = self.at.shape(x)[1]
                    step = PatchSum(tensor, channels, term.register, mean, term.start, term.width, term.grid)
                    self.out.steps.append(step)
                else:
                    one = Grid.whole((1, 1))
                    dst = self._register(term.width, one)
                    self.out.steps.append(MapSum(dst, term.register, mean, term.grid, batch))
                    self._deliver(i, second, Term(dst, one, (), term.start, term.width))
            if self.at.needs[x]:
                self._deliver(i, x, self._times_saved(term, Kept(i, "gate")))

    def _cat(self, i: int, op: Cat, terms: list[Term]) -> None:
        begin = 0
        for value in op.inputs:
            width = self.at.shape(value)[1]
            for term in terms:
                first, last = max(term.start, begin), min(term.start + term.width, begin + width)
                if first >= last or not self.at.needs[value]:
                    continue
                part = self._channels(term, first, last)
                self._deliver(i, value, replace(part, start=first - begin))
            begin += width

    def _channels(self, term: Term, first: int, last: int) -> Term:
        """Channels of a term, counted as the value's: from ``first`` up to ``last``."""
        if last - first == term.width:
            return term
        skipped = first - term.start
        dst = self._register(last - first, term.grid)
        self.out.steps.append(Channels(dst, term.register, skipped, last - first))
        factor = tuple((j, offset + skipped) for j, offset in term.factor)
        return Term(dst, term.grid, factor, first, last - first)

    def _pool(self, i: int, op: Pool, terms: list[Term]) -> None:
        _, c, h, w = self.at.shape(op.inputs[0])
        y = self.region.result(i)
        if not self.at.needs[op.inputs[0]]:
            return
        mean = self._gather(y, y, terms, Grid.whole((1, 1)), c)
        if mean is None:
            return
        whole = Grid.whole((h, w))
        self._deliver(i, op.inputs[0], self._times(Term(mean, whole, (), 0, c), 1 / (h * w)))

    def _resize(self, i: int, op: Resize, terms: list[Term]) -> None:
        """From a single pixel: the sum over the map. Else nothing changes."""
        x, y = op.inputs[0], self.region.result(i)
        _, c, h, w = self.at.shape(y)
        if not self.at.small(x) or (h, w) == (1, 1):
            for term in terms:
                self._deliver(i, x, term)
            return
        if not self.at.needs[x]:
            return
        mean = self._gather(y, y, terms, Grid.whole((h, w)), c)
        if mean is not None:
            self._deliver(i, x, self._times(Term(mean, Grid.whole((1, 1)), (), 0, c), h * w))

    def _resample(self, i: int, op: Pad | WindowPool | Resize, terms: list[Term]) -> None:
        """Of a term without factors, what is constant over pieces of the input; else the factor's mean moves."""
        x, y = op.inputs[0], self.region.result(i)
        along = self._along(op)
        if not self.at.needs[x] or along is None:
            return
        _, c, h, w = self.at.shape(x)
        before = op.channels[0] if isinstance(op, Pad) else 0
        for term in terms:
            first, last = max(term.start, before), min(term.start + term.width, before + c)
            if first >= last:
                continue
            part = self._channels(term, first, last)
            part = replace(part, start=first - before)
            if isinstance(op, WindowPool):
                part = self._times(part, op.ratio)
            found = None
            if not part.factor and not (isinstance(op, WindowPool) and op.kind == "max"):
                grids = zip(along, (part.grid.rows, part.grid.cols), strict=True)
                rows, cols = (axis.back(cuts) for axis, cuts in grids)
                if rows is not None and cols is not None:
                    found = self._back(part, rows, cols)
            if found is None and all(axis.means for axis in along):
                factor = tuple(sorted(((i, part.start), *part.factor)))
                image = self._image(Grid.whole((h, w)), factor)
                if image is not None:
                    found = replace(part, factor=factor, grid=_within(part.grid, image))
            if found is None or not any(pixels(found.grid)):
                means = all(axis.means for axis in along)
                reason = "takes nothing that has a gradient" if means else "counts pixels beyond the map"
                reason = f"{op.name} {reason}"
                self.out.problems.setdefault(y, reason)
            else:
                self._deliver(i, x, found)

    def _back(self, term: Term, rows: Back, cols: Back) -> Term:
        """A term without factors on pieces of the input."""
        grid = Grid(rows.cuts, cols.cuts)
        if rows.factor is not None and cols.factor is not None:
            return self._times(replace(term, grid=grid), rows.factor * cols.factor)
        dst = self._register(term.width, grid)
        weights = [axis.weights or (axis.factor or 0.0,) * axis.cuts.patches for axis in (rows, cols)]
        part = Part(term.register, None, 0, term.width, rows.sums, cols.sums, weights[0], weights[1])
        self.out.steps.append(Gather(dst, term.width, grid, (part,)))
        return replace(term, register=dst, grid=grid)

    def _times(self, term: Term, factor: float) -> Term:
        if factor == 1:
            return term
        dst = self._register(term.width, term.grid)
        self.out.steps.append(Times(dst, term.register, factor))
        return replace(term, register=dst)

    def _times_saved(self, term: Term, kept: Kept) -> Term:
        dst = self._register(term.width, term.grid)
        self.out.steps.append(TimesSaved(dst, term.register, self._slot(kept), term.start, term.width))
        return replace(term, register=dst)


def _shares(whole: Cuts, cells: Cuts, owners: Sequence[int]) -> tuple[float, ...]:
    """By cell, its share of the pixels of the patch of ``whole`` that it lies in."""
    return tuple(count / whole.counts[owner] for count, owner in zip(cells.counts, owners, strict=True))


def _within(grid: Grid, image: Grid) -> Grid:
    """A grid without what lies outside of the patches of another one."""
    axes = ((grid.rows, image.rows), (grid.cols, image.cols))
    return Grid(*(Cuts(a.size, tuple(min(max(p, b.points[0]), b.points[-1]) for p in a.points)) for a, b in axes))


__all__ = ["MAX_TERMS", "Factor", "Kept", "Lowered", "Mean", "Resampling", "Situation", "Term", "lower"]
