"""Bundles: the format of the file, and loading one, which needs no compiler."""
