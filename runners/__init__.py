"""The commands of ``gf-tvm``: argument parsing and printing only; the work is done by the library's Python calls."""
