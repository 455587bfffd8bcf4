"""Measuring candidates: processes that build and run them, here or on the boards of a farm.

Each module builds on those before it:

=================  ====================================================================================
options            what a user may choose: how to measure, and on which boards
result             what comes of a candidate
process            starts processes of ours, asks them with a deadline, ends them
worker             what a process does that builds candidates, or runs them on a CPU
gpu_worker         what one does that runs them on a GPU
service            which of the two
measuring_process  runs candidates in such a process; on this machine, or on a board
measurer           builds on this machine, and measures here too
messages           what the tuner and a board say to each other
answers            what boards say, checked before it is believed
board_service      what a board does for the tuner
link               this machine's process for one board
board_link         that process as the tuner sees it, and the state of what it was asked for
jobs               what waits for a board, what was lost with which
health             what a run knows of each board: troubles, heat, drift
reference          the kernel by which boards are compared
farm_run           what is common to all boards of a run
board              a session with one board: what it works on, what to do when something goes wrong
tracker_watch      which boards there are
farm_measurer      builds on this machine and measures on a farm
ms_runner          MetaSchedule's own tools on a farm
=================  ====================================================================================
"""
