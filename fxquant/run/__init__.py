"""Running a graph: from cut to cut, block by block, on batches, in several processes; the probe.

Passes, analyses and evaluation call this room. It changes no graph and knows no pass.
"""
