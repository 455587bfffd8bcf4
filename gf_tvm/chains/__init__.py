"""Chains of filtered convolutions whose backward pass never leaves the patch grid; see docs/patch_grid.md.

Folders, each using only those before it:

* ``plan``: operations, patch grids, the gradient algebra
* ``compile``: what is compiled of a chain
* ``run``: a chain's plan, and how it runs
* ``capture``: from a model to graphs, by Dynamo, and back to a model that runs in chains

and ``model``: chains in a live model, and the report; ``piece``: a chain by itself, to be measured and checked.
"""

from .model import Chain, ChainReport, chain_model, chains_of, programs_of, unchain_model

__all__ = ["Chain", "ChainReport", "chain_model", "chains_of", "programs_of", "unchain_model"]
