"""Formats that other engines load: one file a format, each read from the graph and checked.

Users and the command line call this room. It knows graphs, not how an option spelled them; an
engine is imported only where an export is checked or run.
"""

from fxquant.exports.compressed_file import compressed_tensors as compressed_tensors
from fxquant.exports.onnx_file import onnx as onnx
