"""The command line: a file for each command's options and what it prints.

Nothing imports this room but the entry points; argparse is known nowhere else.
"""
