"""Questions about a graph, answered by its structure: what absorbs a scale, which channel stands
where, the residual stream, attention's parts; and the moves that the answers allow.

Passes and analyses call this room. It knows operators by kind, never a model's class name.
"""
