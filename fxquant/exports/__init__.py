"""Formats that other engines load: one file a format, each read from the graph and checked.

Users and the command line call this room. It knows graphs, not how an option spelled them; an
engine is imported only where an export is checked or run.
"""

from fxquant.exports.aoti_file import aoti as aoti
from fxquant.exports.awq_file import awq as awq
from fxquant.exports.compressed_file import compressed_tensors as compressed_tensors
from fxquant.exports.gguf_file import gguf as gguf
from fxquant.exports.gptq_file import gptq as gptq
from fxquant.exports.half_scales import with_half_scales as with_half_scales
from fxquant.exports.onnx_file import onnx as onnx
from fxquant.exports.pt2_file import pt2 as pt2
