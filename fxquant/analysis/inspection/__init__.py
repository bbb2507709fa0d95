"""What a graph looks like: listings, diffs of passes, sites, tables, Graphviz.

Users, the command line and reports call this room. It changes nothing and runs only on shapes.
"""
