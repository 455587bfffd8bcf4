"""What of a chain is compiled, and how it is found in a library.

Modules, each using only those before it:

* ``kernels``: what a library has of a chain: products, programs
* ``packs``: what the forward pass keeps for a compiled backward pass, in two buffers
* ``traversal``, ``compiled``: the whole backward pass as one function of a library
* ``segment``: what is element-wise in the forward pass as functions of a library
* ``forward``, ``segmenter``: what a forward pass consists of, and where segments are in it
* ``stage``, ``emit_together``, ``emit_stage``, ``emit_backward``; ``emit_functions``, ``emit_forward``: the functions
  of ``compiled`` and ``segment`` in TVM's IR, where there is a compiler
* ``programs``: what :func:`gf_tvm.build` compiles of chains; the one module that imports these, when it is to build
"""
