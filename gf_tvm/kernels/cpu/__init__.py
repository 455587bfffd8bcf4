"""CPU kernels, written in TVM's IR; see docs/kernels.md."""
