"""Boards behind TVM's RPC tracker: the server on each, the tracker, and how to set boards up and look at them.

Each module builds on those before it:

========  =============================================================================================
protocol  TVM's tracker and RPC handshakes, with a deadline on every step
jetson    what a doctor looks at on a Jetson
server    the board's server
tracker   TVM's tracker: starting it, asking it
wheel     this installation of gf_tvm as a wheel, to be installed on boards
virtual   virtual boards under qemu
deploy    setting up a board over OpenSSH
doctor    checks of a host or a board
========  =============================================================================================
"""
