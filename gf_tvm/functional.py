"""``gf_tvm.functional.conv2d``: a convolution with a filtered backward pass, as a function."""

from .ops.functional import conv2d

__all__ = ["conv2d"]
