"""TE definitions of the filtered backward convolution."""

from .definitions import definition

__all__ = ["definition"]
