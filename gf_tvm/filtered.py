"""Where :class:`gf_tvm.FilteredConv2d` lived in 0.1.0, whose pickles name this module."""

from .ops.module import FilteredConv2d as FilteredConv2d
