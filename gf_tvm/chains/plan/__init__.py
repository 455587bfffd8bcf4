"""What may stay on the patch grid, and which of it forms chains: all that follows from operations and shapes alone.

Modules, each using only those before it:

* ``grids``: patches as cut points, what two grids share, means over patches
* ``sampling``: operations that move pixels, along one axis
* ``elementwise``: activations and other element-wise functions; one record is all that is known of one
* ``graph``: operations on numbered values
* ``steps``: what a backward pass consists of
* ``lowering``: the gradient algebra, from a graph to steps
* ``partition``: which operations form chains, for given shapes
"""
