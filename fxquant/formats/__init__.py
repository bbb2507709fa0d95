"""Number formats: the numbers that an element of a tensor may be, before its scale.

A format is one file with a Grid and a row in ``table.GRIDS``. Anyone may call this room; it knows
torch only: no scheme, no graph, no scale.
"""
