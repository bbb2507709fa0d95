"""The second front end: what a model does, recorded while it runs on tensors without data.

For models and versions of transformers that have no HFTracer. ``tracing`` calls it; it knows no
model by name and no scheme.
"""
