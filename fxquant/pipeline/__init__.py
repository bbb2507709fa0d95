"""Pass, Context and Pipeline: rewrites with contracts that are checked on every result; options
checked from annotations; what repairs share.

Passes derive from this room and recipes build it. It knows no single pass.
"""
