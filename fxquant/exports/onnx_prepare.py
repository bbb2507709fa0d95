"""A copy of a graph in which each coded site is one operator that ONNX Runtime has a kernel for.

Weights stand transposed, [K, N], as its kernels read them, and unpacked: torch has no 4-bit type.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.exports.check import in_float32
from fxquant.exports.sites import CodedSite, coded_sites, groups
from fxquant.ir.graph import is_op, site_outputs, source_of
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.gemm import CHUNK, float_int_gemm

_LIBRARY: Final = torch.library.Library("fxquant_onnx", "DEF")
ONNX_OPS: Any = torch.ops.fxquant_onnx
SHIFT: Final = 128  # from codes of int8 to uint8
CODES: Final = "codes"  # the buffer that holds a site's codes, [K, N]


def coded_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """``x @ ((codes - zero_point) * scale) + bias``: codes int8 [K, N], scale [N] or [G, N]."""
    steps = codes.to(torch.float32)
    if group_size:  # the last group may be shorter
        length = codes.shape[0]
        scale = scale.repeat_interleave(group_size, 0)[:length]
        if zero_point is not None:
            zero_point = zero_point.repeat_interleave(group_size, 0)[:length]
    if zero_point is not None:
        steps = steps - zero_point.to(torch.float32)
    y = torch.matmul(x, steps * scale)
    return y if bias is None else y + bias


def int_product(x_codes: Tensor, codes: Tensor, shift: int) -> Tensor:
    """int32 [..., N] of int8 [..., K] by [K, N], exact; ``codes`` uint8 where ``shift`` is 128."""
    rows = x_codes.reshape(-1, x_codes.shape[-1])
    if shift:
        codes = (codes.to(torch.int16) - shift).to(torch.int8)
    sums = float_int_gemm(rows, codes.t(), CHUNK)
    return sums.view(*x_codes.shape[:-1], codes.shape[1])


_SCHEMAS: Final = {
    "coded_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias,"
    " int group_size) -> Tensor": coded_linear,
    "int_product(Tensor x_codes, Tensor codes, int shift) -> Tensor": int_product,
}
for _schema, _function in _SCHEMAS.items():
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.split("(")[0], _function, "CompositeImplicitAutograd")


def prepared(gm: GraphModule) -> GraphModule:
    """The copy, float32, on the CPU; ``gm`` is at level integer, or float."""
    copy = in_float32(gm)
    for coded in list(coded_sites(copy)):
        _transpose(copy, coded)
    for site, node in list(site_outputs(copy)):
        if site.role == "embeddings" and is_op(node, OPS.dequantize.default):
            _unpack_table(copy, site.path, node, site.shape[1])
    copy.graph.eliminate_dead_code()
    for module in copy.modules():
        if isinstance(module, QuantizedParameters):
            _drop_unread(copy, module)
    copy.recompile()
    return copy


def four_bit(gm: GraphModule) -> set[str]:
    """Paths of the sites whose codes take 4 bits in the file: those of weight-only products."""
    return {
        site.path
        for site in coded_sites(gm)
        if site.quantize is None and site.weight_spec.grid.bits <= 4
    }


def shift_of(bits: int) -> int:
    """How far above the graph's a weight's codes lie in a product of integers.

    Without VNNI, x86 multiplies unsigned by signed bytes and adds pairs of products in 16 bits,
    saturating: pairs of inputs up to 255 by codes of 7 bits fit, 2 * 255 * 64, those of 8 do not.
    Products of two unsigned bytes are exact.
    """
    return SHIFT if 2 * 255 * 2 ** (bits - 1) > 2**15 - 1 else 0


def _transpose(gm: GraphModule, site: CodedSite) -> None:
    held = site.codes()
    behind: tuple[Any, ...]
    buffers = {CODES: held.codes.t().contiguous()}
    output = site.output
    if site.quantize is None:
        rows, size = held.codes.shape[0], groups(site.weight_spec, held.codes.shape[1])
        buffers["scale"] = _as_read(held.scales, rows, size)
        if held.zero_points is not None:
            buffers["zero_point"] = _as_read(held.zero_points, rows, size).to(torch.int8)
        product, call = output, operands(output)
        target, x, behind = ONNX_OPS.coded_linear.default, call.input, (call.bias, size)
    else:
        bare = operands(output).y if is_op(output, OPS.add_bias.default) else output
        product = operands(bare).sums
        shift = shift_of(site.weight_spec.grid.bits)
        if shift:
            buffers[CODES] = (buffers[CODES].to(torch.int16) + shift).to(torch.uint8)
        target, x, behind = ONNX_OPS.int_product.default, site.quantize, (shift,)
    module = gm.get_submodule(site.path)
    for name, value in buffers.items():
        module.register_buffer(name, value)
    with gm.graph.inserting_before(product):
        read = {name: gm.graph.get_attr(f"{site.path}.{name}") for name in buffers}
        scales = (read["scale"], read.get("zero_point")) if "scale" in read else ()
        arguments: tuple[Any, ...] = (x, read[CODES], *scales, *behind)
        new = gm.graph.create_node("call_function", target, arguments)
    new.meta = dict(product.meta)
    product.replace_all_uses_with(new)
    gm.graph.erase_node(product)


def _as_read(values: Tensor, rows: int, size: int) -> Tensor:
    """[N] or, in groups, [G, N]."""
    if values.dim() == 0:
        return values.expand(rows).contiguous()
    return values.t().contiguous() if size else values[:, 0].contiguous()


def _unpack_table(gm: GraphModule, path: str, node: Node, length: int) -> None:
    """Look up int8 codes where the graph looks up packed ones and unpacks the rows."""
    unpack = operands(node).codes
    if not is_op(unpack, OPS.unpack_int4.default):
        return
    rows = operands(unpack).packed
    module = gm.get_submodule(path)
    table = torch.ops.fxquant.unpack_int4(module.weight, length)
    module.register_buffer("table", table)
    with gm.graph.inserting_before(rows):
        new = gm.graph.call_function(
            nn.functional.embedding, (source_of(rows), gm.graph.get_attr(f"{path}.table"))
        )
    unpack.replace_all_uses_with(new)


def _drop_unread(gm: GraphModule, module: QuantizedParameters) -> None:
    paths = {id(part): path for path, part in gm.named_modules()}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name in list(module._buffers):
        if f"{paths[id(module)]}.{name}" not in read:
            del module._buffers[name]
