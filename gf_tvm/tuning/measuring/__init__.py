"""Measuring candidates: processes that build and run them, here or on the boards of a farm."""
