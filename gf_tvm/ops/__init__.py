"""PyTorch's side of one filtered convolution: operators, the choice of a kernel, function and module."""
