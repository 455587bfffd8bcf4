"""GPU kernels as TE definitions; see docs/gpu.md."""
