"""How the codes of one weight are chosen: GPTQ, coordinate descent, the search for a range.

Passes call these on a weight and its statistics; a solver knows no graph and no calibration.
"""
