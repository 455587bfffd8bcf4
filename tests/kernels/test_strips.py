"""Index tables of pooling and spreading, followed lane by lane in Python."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gf_tvm.core.geometry import Geometry
from gf_tvm.kernels.cpu.strips import (
    Pooling,
    Spreading,
    planes_together,
    pooling,
    power_of_two,
    runs,
    spreading,
    spreading_planes,
)

LANES = st.sampled_from([4, 8, 16])


@st.composite
def axes(draw: st.DrawFn) -> Geometry:
    """A geometry whose columns are interesting; its channels do not matter."""
    size, kernel = draw(st.integers(1, 70)), draw(st.integers(1, 5))
    padding = draw(st.integers(max(0, -((size - kernel) // 2)), 4))
    stride, patch = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    return Geometry(1, 1, 1, size, size, kernel, patch, stride=stride, padding=padding)


def vectors(plans: list[Pooling] | list[Spreading], least: int) -> list[Pooling] | list[Spreading]:
    """The plans once more, by way of runs."""
    found = []
    for run in runs(plans, least):
        for t in range(run.times):
            first = run.first
            if isinstance(first, Pooling):
                loads = tuple(load + t * run.pixels for load in first.loads)
                patch = first.patch + t * run.patches
                found.append(Pooling(patch, first.count, first.lanes, loads, first.width, first.taps))
            else:
                place = first.pixel + t * run.pixels, first.patch + t * run.patches
                found.append(Spreading(*place, first.width, first.picks))
    return found


@given(axes(), LANES, st.booleans())
def test_pooling_sums_each_patch_once_and_reads_nothing_else(geometry: Geometry, lanes: int, out: bool) -> None:
    axis = geometry.cols
    patches = [(axis.out_range if out else axis.in_range)(i) for i in range(axis.patches)]
    size = axis.out if out else axis.size
    row = [random.Random(size).random() for _ in range(size)]
    plans = pooling(patches, size, lanes)
    assert vectors(plans, 2) == plans
    sums: dict[int, float] = {}
    for plan in plans:
        assert plan.lanes == power_of_two(plan.lanes) <= lanes
        assert all(load >= 0 and load + plan.width <= size for load in plan.loads)
        loaded = [row[load + k] for load in plan.loads for k in range(plan.width)]
        for lane in range(plan.count):
            sums[plan.patch + lane] = sum(loaded[tap[lane]] for tap in plan.taps if tap[lane] is not None)
    assert sums.keys() == set(range(len(patches)))
    for patch, pixels in enumerate(patches):
        assert sums[patch] == pytest.approx(sum(row[pixel] for pixel in pixels))


@given(axes(), LANES, st.booleans())
def test_spreading_writes_each_pixel_its_patch(geometry: Geometry, lanes: int, stream: bool) -> None:
    axis = geometry.cols
    patches = [axis.in_range(i) for i in range(axis.patches)]
    aligned = axis.size & -axis.size if stream else None
    plans = spreading(patches, lanes, aligned)
    assert vectors(plans, 2) == plans
    written: dict[int, int] = {}
    times = [0] * axis.size
    for plan in plans:
        assert plan.width <= lanes
        for lane, pick in enumerate(plan.picks):
            assert 0 <= pick < plan.width
            written[plan.pixel + lane] = plan.patch + pick
            times[plan.pixel + lane] += 1
        if aligned is not None:
            assert plan.pixel % plan.lanes == 0
            assert aligned % plan.lanes == 0
    assert written == {pixel: patch for patch, pixels in enumerate(patches) for pixel in pixels}
    if stream:
        assert max(times) <= 1


@given(axes(), LANES)
def test_planes_are_written_whole(geometry: Geometry, lanes: int) -> None:
    rows = [geometry.rows.in_range(i) for i in range(geometry.rows.patches)]
    columns = [geometry.cols.in_range(i) for i in range(geometry.cols.patches)]
    planes = planes_together(geometry.h * geometry.w, lanes)
    plans = spreading_planes(rows, columns, (geometry.h, geometry.w), planes, lanes)
    if not geometry.covers_input:
        assert plans is None
        return
    assert plans is not None
    found = []
    for plan in plans:
        assert plan.pixel == len(found)
        assert len(plan.picks) == lanes
        found += [(plan.loads[k // plan.width][0], plan.loads[k // plan.width][1] + k % plan.width) for k in plan.picks]
    owner_h = {pixel: patch for patch, pixels in enumerate(rows) for pixel in pixels}
    owner_w = {pixel: patch for patch, pixels in enumerate(columns) for pixel in pixels}
    assert found == [
        (plane, owner_h[h] * len(columns) + owner_w[w])
        for plane in range(planes)
        for h in range(geometry.h)
        for w in range(geometry.w)
    ]
