"""Chains of filtered convolutions whose backward pass never leaves the patch grid; see docs/patch_grid.md.

Modules, each using only those before it:

* ``grids``: patches as cut points, what two grids share, means over patches
* ``elementwise``: activations and other element-wise functions; one record is all that is known of one
* ``graph``: operations on numbered values
* ``steps``: what a backward pass consists of
* ``lowering``: the gradient algebra, from a graph to steps
* ``partition``: which operations form chains, for given shapes
* ``kernels``: what a library has of a chain: products, programs
* ``packs``: what the forward pass keeps for a compiled backward pass, in two buffers
* ``traversal``, ``compiled``: the whole backward pass as one function of a library
* ``segment``: what is element-wise in the forward pass as functions of a library
* ``forward``, ``segmenter``: what a forward pass consists of, and where segments are in it
* ``plan``: one chain, with everything about shapes settled
* ``run``: the autograd function: a plan's forward and backward pass in PyTorch
* ``stage``, ``emit_together``, ``emit_stage``, ``emit_backward``; ``emit_functions``, ``emit_forward``: the functions
  of ``compiled`` and ``segment`` in TVM's IR, where there is a compiler
* ``programs``: what :func:`gf_tvm.build` compiles of chains; the one module that imports these, when it is to build
* ``recognise``, ``capture``: from a module to graphs, by torch.fx
* ``interpreter``: a captured module, running
* ``model``: chains in a live model, and the report
* ``piece``: a chain by itself, to be measured and checked
"""

from .model import Chain, ChainReport, chain_model, chains_of, programs_of, unchain_model

__all__ = ["Chain", "ChainReport", "chain_model", "chains_of", "programs_of", "unchain_model"]
