"""What a segment of a chain computes, with plain PyTorch operators, in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gf_tvm.chains.compile.segment import Part, Product, Segment
from gf_tvm.chains.plan import elementwise, grids


def inputs_of(segment: Segment) -> int:
    """How many of a segment's arguments it reads."""
    return segment.maps + len(list(segment.parameters()))


def reference(segment: Segment) -> Callable[..., None]:
    """A function that takes a segment's arguments and does what its compiled function does."""

    def run(*arguments: Tensor) -> None:
        given = iter(arguments)
        values = [next(given).clone() for _ in range(segment.maps)]
        places = list(arguments[: segment.maps])
        parameters = {which: next(given) for which in segment.parameters()}
        slopes, derivatives = {}, {}
        for k, node in enumerate(segment.nodes):
            x = [values[v] for v in node.inputs]
            if node.kind == "norm":
                own = {name: parameters.get((k, name)) for name in ("mean", "variance", "scale", "shift")}
                assert own["mean"] is not None
                assert own["variance"] is not None
                inverse = 1 / torch.sqrt(own["variance"] + node.settings[0])
                slopes[k] = inverse if own["scale"] is None else inverse * own["scale"]
                normalised = (x[0] - own["mean"][:, None, None]) * inverse[:, None, None]
                derivatives[k] = normalised
                y = normalised if own["scale"] is None else normalised * own["scale"][:, None, None]
                values.append(y if own["shift"] is None else y + own["shift"][:, None, None])
            elif node.kind == "add":
                values.append(x[0] + node.settings[0] * x[1])
            elif node.kind == "scale":
                values.append(x[0] * node.settings[0])
            else:
                y, slope = elementwise.run(node.kind, node.settings, x[0].clone(), False, True)
                assert slope is not None
                derivatives[k] = slope
                values.append(y)

        def part(what: Part) -> Tensor:
            if what.what == "map":
                return values[what.of]
            if what.what == "derivative":
                return derivatives[what.of]
            z = values[what.of]
            return elementwise.FUNCTIONS[what.kind].derivative(torch.ones_like(z), z, *what.settings)

        def product(parts: Product) -> Tensor:
            result = part(parts[0])
            for other in parts[1:]:
                result = result * part(other)
            return result

        results = [(values[value], next(given) if over is None else places[over]) for value, over in segment.written]
        results += [(product(parts), next(given)) for parts in segment.handed]
        for average in segment.averages:
            small: Any = grids.patch_means(product(average.product), average.grid)
            if average.layout != "means":
                counts = [
                    torch.tensor(cuts.counts, dtype=small.dtype) for cuts in (average.grid.rows, average.grid.cols)
                ]
                small = small * counts[0][:, None] * counts[1]
            results.append(
                (small.permute(0, 2, 3, 1) if average.layout == "sums, channels last" else small, next(given))
            )
        results += [(slopes[k], next(given)) for k in segment.slopes]
        assert next(given, None) is None
        for result, place in results:
            assert result.shape == place.shape
            place.copy_(result)

    return run
