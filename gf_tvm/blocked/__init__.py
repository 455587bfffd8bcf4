"""Exact convolutions, and what stands between them, on maps in blocks of channels: for CPUs, written in TVM's IR.

* ``maps``: how a map lies in memory; ``steps``: what is computed, as plain data; ``tiling``: how it is cut
* ``winograd``: the matrices of Winograd's algorithm
* ``packing``: frozen parameters as the code reads them
* ``convolution``: one convolution of PyTorch's tensors as a program
* ``emit_steps``, ``emit_packing``: the code; they import TVM's compiler
"""
