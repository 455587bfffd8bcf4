"""The version, for modules that would otherwise import the whole package to name it."""

__version__ = "0.1.0"
