"""Graphs as folders: save, and load without running anything that a file says.

Users, evaluation and the command line call this room. It imports no pass: what a file may hold is
listed here, and leaves are those of ``ir``.
"""
