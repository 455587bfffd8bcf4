"""From a model to graphs: what Dynamo captured, in ATen operators, and which of it may stay on the patch grid.

Modules, each using only those before it:

* ``aten``: a captured graph as one list of ATen operators, with what works in place written as what it computes
* ``sites``: the convolutions in a graph, their names, and which of them are filtered
* ``recognise``: ATen operators as operations of :mod:`gf_tvm.chains.plan.graph`
* ``regions``: a graph's stretches as regions
* ``assemble``: the graph again, with chains in it
* ``wanted``: the kernels that it can use
* ``backend``: all of it as a backend of ``torch.compile``
* ``live``: a filtered model that compiles itself when it runs
"""
