"""From scheduled TVM modules to shared libraries (CPUs) and to CUDA programs (GPUs)."""
