"""Files on disk: read with one clear error, written whole or not at all, locked, mapped.

Anyone may call this room. It knows errors and torch's tensors, and nothing of schemes or graphs.
"""
