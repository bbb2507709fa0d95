"""The GEMM certificates that stand as literals in an integer graph, checked against its codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import VerificationError
from fxquant.formats.packing import unpack_int4
from fxquant.ir.graph import get_tensor, is_op, tag
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.gemm import CHUNK, certified_chunk


def check_chunks(gm: GraphModule) -> None:
    """Raise VerificationError, with the site, where an int_gemm would not be exact as written."""
    for node in gm.graph.nodes:
        if is_op(node, OPS.int_gemm.default):
            _check(gm, node)


def _check(gm: GraphModule, node: Node) -> None:
    call = operands(node)
    chunk = call.chunk
    where = tag(node).site or node.name
    if type(chunk) is not int or chunk not in (0, CHUNK):
        raise VerificationError(f"{where}: chunk {chunk!r} is neither 0 nor {CHUNK}")
    if chunk == 0 and certified_chunk_of(gm, call.x_codes, call.weight_codes):
        raise VerificationError(
            f"{where}: its int_gemm is written as one fp32 GEMM, but its codes may overflow 2**24"
        )


def certified_chunk_of(gm: GraphModule, x_codes: object, weight: object) -> int:
    """certified_chunk of an int_gemm's operands; CHUNK where its weight is no constant."""
    length = None
    if is_op(weight, OPS.unpack_int4.default):
        packed = operands(weight)
        weight, length = packed.packed, packed.length
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return CHUNK
    codes = get_tensor(gm, weight)
    if length is not None:
        codes = unpack_int4(codes, length)
    if codes.dtype != torch.int8:
        raise VerificationError(f"{weight.name}: codes of int_gemm are int8, not {codes.dtype}")
    max_code = 128
    if is_op(x_codes, OPS.quantize.default):
        ends = operands(x_codes)
        max_code = max(-ends.qmin, ends.qmax)
    return certified_chunk(codes, max_code)
