"""What each kernel should compute, in float64 on the CPU, and how far a right result may be from it.

Written from the definitions alone: whether a pixel lies in a patch is a matrix of zeros and ones, so sums over
patches, and what is written to every pixel of a patch, are matrix products. Slow and short, for checking kernels on
a board. Source: Yang, Li, Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023, section 3.
"""

import math
from typing import Dict, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bundle import Convolution

#: Errors of sums are about the root of their length, in units of the last place; this many times that is too much.
SAFETY = 4.0
#: Elements of x or y that :func:`compared` takes at a time: float64 copies of a large batch do not fit beside it.
PIECE = 1 << 22
# Outputs that are sums over the batch.
_SUMS = frozenset(("grad_w", "grad_b"))


class Expected(NamedTuple):
    """An output in float64, the sums of its terms' magnitudes, and how long those sums are."""

    value: Tensor
    magnitude: Tensor
    terms: int


class _Axis:
    """The rows, or the columns, of a convolution's maps and patches."""

    def __init__(self, at: Convolution, d: int) -> None:
        size, kernel, stride, dilation, patch = (at.h, at.w)[d], at.kernel[d], at.stride[d], at.dilation[d], at.patch[d]
        self.out = (size + 2 * at.padding[d] - dilation * (kernel - 1) - 1) // stride + 1
        self.patches = -(-self.out // patch)
        self.inside_y = _inside(self.patches, patch, self.out)
        self.inside_x = _inside(self.patches, patch * stride, size)
        self.mean_y = self.inside_y / self.inside_y.sum(dim=1, keepdim=True)


def _inside(patches: int, width: int, size: int) -> Tensor:
    """(patches, size): 1 where the pixel lies in the patch; patches of ``width`` pixels, centred on the map."""
    matrix = torch.zeros(patches, size, dtype=torch.float64)
    offset = -(-(patches * width - size) // 2)  # rounded up; negative where pixels are left over
    for i in range(patches):
        start = i * width - offset
        matrix[i, max(start, 0) : max(start + width, 0)] = 1
    return matrix


def covered(at: Convolution) -> Tensor:
    """(h, w): whether the pixel of x lies in any patch."""
    rows, cols = _Axis(at, 0), _Axis(at, 1)
    return (rows.inside_x.sum(dim=0)[:, None] * cols.inside_x.sum(dim=0)) > 0


def expected(name: str, at: Convolution, inputs: Dict[str, Tensor]) -> Dict[str, Expected]:
    """The outputs of the kernel ``name`` for ``inputs`` (on the CPU, of any dtype), by their names.

    Raises ValueError for a kernel that is not known here.
    """
    exact = {key: tensor.double() for key, tensor in inputs.items()}
    values, magnitudes = _run(name, at, exact), _run(name, at, {key: tensor.abs() for key, tensor in exact.items()})
    terms = _terms(at)
    return {key: Expected(value, magnitudes[key], terms[key]) for key, value in values.items()}


def _terms(at: Convolution) -> Dict[str, int]:
    """Length of the sums behind each output."""
    rows, cols = _Axis(at, 0), _Axis(at, 1)
    patch, patches = at.patch[0] * at.patch[1], at.n * rows.patches * cols.patches
    taps = at.kernel[0] * at.kernel[1] * at.co // at.groups
    return {
        "filtered_x": patch * at.stride[0] * at.stride[1],
        "g": patch,
        "grad_b": at.n * rows.out * cols.out,
        "grad_x_grid": taps,
        "grad_x": patch + taps,
        "grad_w": patch + patches,
    }


def compared(
    name: str, at: Convolution, inputs: Dict[str, Tensor], outputs: Dict[str, Tensor]
) -> Iterator[Tuple[str, Tensor, Expected]]:
    """What a kernel has computed beside what it should have, some images at a time: a board's memory is small.

    Yields (name of an output, these images of it on the CPU, what is expected), and in the end the outputs that are
    sums over all images. Arguments as in :func:`expected`; ``outputs`` may be on a GPU.
    """
    step = max(1, PIECE // (at.h * at.w * max(at.ci, at.co)))
    terms = _terms(at)
    sums: Dict[str, Expected] = {}
    for start in range(0, at.n, step):
        images = slice(start, min(start + step, at.n))
        piece = {key: tensor if key == "weight" else tensor[images] for key, tensor in inputs.items()}
        for key, want in expected(name, at._replace(n=images.stop - start), piece).items():
            if key not in _SUMS:
                yield key, outputs[key][images].cpu(), want
            elif key in sums:
                sums[key] = Expected(sums[key].value + want.value, sums[key].magnitude + want.magnitude, terms[key])
            else:
                sums[key] = want._replace(terms=terms[key])
    for key, want in sums.items():
        yield key, outputs[key].cpu(), want


def excess(output: Tensor, want: Expected) -> float:
    """The largest error in units of what is allowed: up to 1 is right, NaN counts as infinite."""
    storage = torch.finfo(output.dtype)
    bound = SAFETY * math.sqrt(want.terms) * torch.finfo(torch.float32).eps * want.magnitude
    bound = bound + storage.eps * want.value.abs() + storage.tiny
    error = float(((output.double() - want.value).abs() / bound).max())
    return math.inf if math.isnan(error) else error


def _run(name: str, at: Convolution, inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
    rows, cols = _Axis(at, 0), _Axis(at, 1)
    depthwise = at.groups == at.ci == at.co
    if name == "filter_input":
        sums = rows.inside_x @ inputs["x"] @ cols.inside_x.t()
        return {"filtered_x": (sums if depthwise else sums.permute(0, 2, 3, 1)).contiguous()}
    made = {}
    g = inputs.get("g")
    grid = inputs.get("grad_x_grid")
    if "grad_y" in inputs:
        g = rows.mean_y @ inputs["grad_y"] @ cols.mean_y.t()
        made["grad_b"] = inputs["grad_y"].sum(dim=(0, 2, 3))
    if name == "filter_grad":
        made["g"] = _given(g)
    if name in ("backward", "backward_input", "input_grad"):
        grid = _input_grad(_given(g), inputs["weight"], at)
    if name in ("backward", "backward_weight", "weight_grad"):
        saved = inputs["filtered_x"]
        made["grad_w"] = _weight_grad(_given(g), saved if depthwise else saved.permute(0, 3, 1, 2), at)
    if name == "input_grad":
        made["grad_x_grid"] = _given(grid)
    if name in ("backward", "backward_input", "expand"):
        made["grad_x"] = rows.inside_x.t() @ _given(grid) @ cols.inside_x
    if not made:
        raise ValueError(f"unknown kernel {name!r}")
    return made


def _given(tensor: Optional[Tensor]) -> Tensor:
    assert tensor is not None
    return tensor


def _input_grad(g: Tensor, weight: Tensor, at: Convolution) -> Tensor:
    """g~ (n, co, ph, pw) -> grad_x~ (n, ci, ph, pw)."""
    steps = (at.dilation[0] // at.patch[0], at.dilation[1] // at.patch[1])
    if min(steps) < 1 or min(at.dilation) < 2:
        return F.conv_transpose2d(g, weight.sum(dim=(2, 3), keepdim=True), groups=at.groups)
    full = F.conv_transpose2d(g, weight, dilation=steps, groups=at.groups)
    # Of the rows that dilation adds, the smaller half stands before the map.
    top, left = (_upper_half(steps[d] * (at.kernel[d] - 1)) for d in (0, 1))
    return full[:, :, top : top + g.shape[2], left : left + g.shape[3]]


def _upper_half(value: int) -> int:
    return value - value // 2


def _weight_grad(g: Tensor, filtered_x: Tensor, at: Convolution) -> Tensor:
    """g~ (n, co, ph, pw) and x~ (n, ci, ph, pw) -> grad_W (co, ci/groups, kh, kw)."""
    left, right = _by_group(g, at.groups), _by_group(filtered_x, at.groups)
    sums = (left @ right.transpose(1, 2)).reshape(at.co, -1, 1, 1)
    return sums.expand(-1, -1, *at.kernel).contiguous()


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(n, c, ph, pw) -> (groups, c/groups, n * ph * pw)."""
    return t.transpose(0, 1).reshape(groups, t.shape[1] // groups, -1)


def random_inputs(shapes: Dict[str, Tuple[Tuple[int, ...], torch.dtype]], seed: int) -> Dict[str, Tensor]:
    """Normally distributed tensors on the CPU, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in shapes.items()}
