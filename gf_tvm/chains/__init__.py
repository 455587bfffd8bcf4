"""Chains of filtered convolutions whose backward pass never leaves the patch grid; see docs/patch_grid.md."""

from .model import Chain, ChainReport, chain_model, chains_of, programs_of, unchain_model

__all__ = ["Chain", "ChainReport", "chain_model", "chains_of", "programs_of", "unchain_model"]
