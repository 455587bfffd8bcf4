"""The forward pass of what needs no gradients, compiled: parts of a captured model; see docs/forward.md.

* ``lower``: from operations of a region to steps
* ``front``: steps, and where their maps lie in memory
* ``programs``, ``emit_front``: as one compiled function
* ``engine``, ``arena``: runs it in a model
"""
