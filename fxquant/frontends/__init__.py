"""From a user's model to a float graph: reading it, tracing it, comparing the two.

The only room that knows transformers' models. Recipes, checkpoint and evaluation call it; it knows
no scheme and no pass.
"""
