"""Where :class:`gf_tvm.Library` lived in 0.1.0, whose pickles name this module."""

from .bundle.library import Library as Library
from .bundle.library import _reload as _reload
