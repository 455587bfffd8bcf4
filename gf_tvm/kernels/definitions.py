"""Every kernel as TE says it most plainly: one stage a quantity, no tiles, tensors in PyTorch's order.

This is what MetaSchedule's own rules get (``gf-tvm tune --space metaschedule``) and what a simple schedule runs
where no space of ours is worth its while. What CPUs run otherwise is in
:mod:`gf_tvm.kernels.cpu.sweep` and its neighbours.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import te

from ..core.geometry import Geometry
from ..core.workload import Workload
from . import stages as st


def definition(workload: Workload) -> Any:
    """The IRModule of ``workload`` with one unscheduled PrimFunc ``main``.

    Its arguments are those of :func:`gf_tvm.core.verify.argument_specs`.
    """
    geometry, dtype = workload.geometry, workload.dtype
    args = st.placeholders(geometry, dtype)
    build = {
        "filter_input": _filter_input,
        "filter_grad": _filter_grad,
        "input_grad": _input_grad_only,
        "weight_grad": _weight_grad_only,
        "expand": _expand_only,
        "backward": _backward,
        "backward_input": _backward,
        "backward_weight": _backward,
    }[workload.kernel]
    inputs, outputs = build(workload.kernel, geometry, dtype, args)
    return tvm.IRModule({"main": te.create_prim_func([*inputs, *outputs])})


def _filter_input(_: str, geometry: Geometry, dtype: str, args: dict[str, Any]) -> Any:
    x = args["x"]
    if geometry.depthwise:
        out = te.compute(
            geometry.saved_shape, lambda n, c, i, j: st.sum_of_patch(geometry, x, n, c, i, j), name="filtered_x"
        )
    else:
        out = te.compute(
            geometry.saved_shape, lambda n, i, j, c: st.sum_of_patch(geometry, x, n, c, i, j), name="filtered_x"
        )
    return [x], [out]


def _mean(geometry: Geometry, grad_y: Any) -> Any:
    return te.compute(
        (geometry.n, geometry.co, *geometry.grid),
        lambda n, o, i, j: st.mean_of_patch(geometry, grad_y, n, o, i, j),
        name="g",
    )


def _bias_grad(geometry: Geometry, g: Any, dtype: str) -> Any:
    """grad_b from g~, exact: every output pixel lies in one patch, so means times counts add up to the sum."""
    (ph, pw), n = geometry.grid, geometry.n
    batch = te.reduce_axis((0, n), "rn")
    i, j = te.reduce_axis((0, ph), "ri"), te.reduce_axis((0, pw), "rj")
    sums = te.compute(
        (geometry.co,),
        lambda o: te.sum(g[batch, o, i, j] * st.patch_count(geometry, i, j), axis=[batch, i, j]),
        name="bias_sum",
    )
    return te.compute((geometry.co,), lambda o: st.store(sums[o], dtype), name="grad_b")


def _filter_grad(_: str, geometry: Geometry, dtype: str, args: dict[str, Any]) -> Any:
    g = _mean(geometry, args["grad_y"])
    return [args["grad_y"]], [g, _bias_grad(geometry, g, dtype)]


def _input_grad(geometry: Geometry, g: Any, weight: Any) -> Any:
    """grad_x~ (n, ci, ph, pw)."""
    cig, cog = geometry.ci_group, geometry.co_group
    shape = (geometry.n, geometry.ci, *geometry.grid)
    o = te.reduce_axis((0, cog), "ro")
    if geometry.dilated:
        ka, kb = te.reduce_axis((0, geometry.kernel[0]), "ka"), te.reduce_axis((0, geometry.kernel[1]), "kb")

        def convolve(n: Any, c: Any, i: Any, j: Any) -> Any:
            out = (c // cig) * cog + o
            y, x, exists = st.grid_neighbour(geometry, i, j, ka, kb)
            tap = st.rotated_tap(geometry, weight, out, c % cig, ka, kb)
            return te.sum(st.guard(exists, g[n, out, y, x]) * tap, axis=[o, ka, kb])

        return te.compute(shape, convolve, name="grad_x_grid")
    taps = te.compute((geometry.co, cig), lambda o, c: st.sum_of_taps(geometry, weight, o, c), name="taps")
    return te.compute(
        shape,
        lambda n, c, i, j: te.sum(taps[(c // cig) * cog + o, c % cig] * g[n, (c // cig) * cog + o, i, j], axis=o),
        name="grad_x_grid",
    )


def _input_grad_only(_: str, geometry: Geometry, dtype: str, args: dict[str, Any]) -> Any:
    return [args["g"], args["weight"]], [_input_grad(geometry, args["g"], args["weight"])]


def _weight_grad(geometry: Geometry, g: Any, saved: Any, dtype: str) -> Any:
    (ph, pw), cig, cog = geometry.grid, geometry.ci_group, geometry.co_group
    n = te.reduce_axis((0, geometry.n), "rn")
    i, j = te.reduce_axis((0, ph), "ri"), te.reduce_axis((0, pw), "rj")
    sums = te.compute(
        (geometry.co, cig),
        lambda o, c: te.sum(
            g[n, o, i, j] * st.saved_at(geometry, saved, n, (o // cog) * cig + c, i, j), axis=[n, i, j]
        ),
        name="weight_sum",
    )
    return te.compute(geometry.weight_shape, lambda o, c, _a, _b: st.store(sums[o, c], dtype), name="grad_w")


def _weight_grad_only(_: str, geometry: Geometry, dtype: str, args: dict[str, Any]) -> Any:
    return [args["g"], args["saved"]], [_weight_grad(geometry, args["g"], args["saved"], dtype)]


def _expand(geometry: Geometry, grid: Any, dtype: str) -> Any:
    def pixel(n: Any, c: Any, h: Any, w: Any) -> Any:
        i, j, exists = st.input_patch(geometry, h, w)
        return st.store(st.guard(exists, grid[n, c, i, j]), dtype)

    return te.compute(geometry.x_shape, pixel, name="grad_x")


def _expand_only(_: str, geometry: Geometry, dtype: str, args: dict[str, Any]) -> Any:
    return [args["grad_x_grid"]], [_expand(geometry, args["grad_x_grid"], dtype)]


def _backward(kernel: str, geometry: Geometry, dtype: str, args: dict[str, Any]) -> Any:
    g = _mean(geometry, args["grad_y"])
    inputs, outputs = [args["grad_y"]], []
    if kernel != "backward_input":
        inputs.append(args["saved"])
    if kernel != "backward_weight":
        inputs.append(args["weight"])
        outputs.append(_expand(geometry, _input_grad(geometry, g, args["weight"]), dtype))
    if kernel != "backward_input":
        outputs.append(_weight_grad(geometry, g, args["saved"], dtype))
    outputs.append(_bias_grad(geometry, g, dtype))
    return inputs, outputs
