"""Devices: their profiles, and what this machine is, can and uses at the moment."""
