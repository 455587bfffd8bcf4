"""Errors of this package."""


class GfCudaError(RuntimeError):
    """Base of all errors that this package raises."""
