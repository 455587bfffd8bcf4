"""The mathematics: index arithmetic, names of workloads, the reference in PyTorch, and what counts as right."""
