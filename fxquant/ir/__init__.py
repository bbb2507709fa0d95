"""The graph: its sites and facts, operators, legal forms, leaves, the builder, what is recorded.

Everything that touches a graph stands on this room. It knows no model class and no transformers,
runs nothing and decides nothing.
"""
