"""From a scheme to a pipeline: the table of repairs, the order of passes, ``convert``.

Analyses, evaluation and users call this room; passes do not know it.
"""
