"""The kernels of the filtered backward convolution, as TVM takes them; see docs/kernels.md.

* ``definitions``, ``stages``: every kernel as plain TE, which says what it computes: what MetaSchedule schedules by
  itself, and what spaces of simple schedules start from
* ``cpu``: for CPUs, written in TVM's IR; the backward pass of dilated convolutions in TE
* ``gpu``: for GPUs, in TE
* ``rewrite``: what TE cannot say, for those in TE
"""

from .definitions import definition

__all__ = ["definition"]
