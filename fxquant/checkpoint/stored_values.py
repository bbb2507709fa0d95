"""What the tensors of a saved graph hold, checked against what the graph says that they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import CheckpointError
from fxquant.files.tensor_file import dtype_name
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import FP32, ScaleFormat
from fxquant.formats.table import GRIDS
from fxquant.ir.graph import get_tensor, info, is_op
from fxquant.ir.leaves import CodedLinear, InverseScale, OutlierIndex, QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.quantization import group_count, split_groups
from fxquant.numerics.weight_codes import GLOBAL_SCALE
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import TensorSpec

_RANGES = {grid.codes for grid in GRIDS.values() if isinstance(grid, IntegerGrid)}
_SCALES = ("input_scale", "left_scale", "right_scale")
_NAMES = (
    *("weight", "weight_scale", "weight_zero_point", "weight_sum", "input_zero_point", "bias"),
    GLOBAL_SCALE,
)
_CODED = ("weight", "weight_scale")  # what may be of float8
_ELEMENTS = 2**22  # of codes that are unpacked at once


def check_values(gm: GraphModule) -> None:
    """Raise CheckpointError, with site and tensor, for values that no pass would have left.

    Numbers are finite and scales positive; codes and zero points lie in the range of the site's
    recorded spec, with the dtypes and shapes of that spec; sums of codes are theirs; the literals
    of quantize nodes are a range of their dtype.
    """
    _check_numbers(gm)
    coded = _recorded(gm)
    for path, module in gm.named_modules():
        if isinstance(module, QuantizedParameters):
            _check_site(path, module, coded.get(path))
        elif isinstance(module, OutlierIndex):
            index, keep = module.get_buffer("index"), module.get_buffer("keep")
            columns = keep.numel()
            flat = index.dim() == keep.dim() == 1
            if not flat or index.dtype != torch.int64 or not _within(index, 0, columns - 1):
                _fail(path, "index", f"columns of {columns}")
            expected = torch.ones_like(keep).index_fill(0, index, 0)
            if index.unique().numel() < index.numel() or not torch.equal(keep, expected):
                _fail(path, "keep", "0 at the columns of the index, each given once, 1 elsewhere")
        elif isinstance(module, InverseScale):
            values = module.get_buffer("values")
            if not bool((values.isfinite() & (values != 0)).all()):
                _fail(path, "values", "finite numbers other than 0")
    for node in gm.graph.nodes:
        if node.op == "call_function":
            _check_literals(gm, node)


def _fail(path: str, name: str, expected: str) -> NoReturn:
    raise CheckpointError(f"{path}.{name}: expected {expected}; the file was changed or is damaged")


def _check_numbers(gm: GraphModule) -> None:
    for path, module in gm.named_modules():
        for name in (*module._parameters, *module._buffers):
            value = getattr(module, name)
            if value is None or not value.is_floating_point() or not value.numel():
                continue
            value = value.detach()
            if value.element_size() == 1:  # float8, which has no minimum, and no sum with floats
                if not (isinstance(module, QuantizedParameters) and name in _CODED):
                    _fail(path, name, "a dtype to compute in")
                value = value.to(torch.float32)
            low, high = (float(end) for end in torch.aminmax(value))
            if math.isfinite(low) and math.isfinite(high):
                continue
            learned = name in module._parameters or isinstance(module, QuantizedParameters)
            if learned or not _is_mask(value):
                _fail(path, name, "finite numbers")


def _is_mask(value: Tensor) -> bool:
    """Whether it is what is added to scores: 0 where a position is seen, else -inf."""
    seen = value == 0
    return value.dim() > 1 and bool(seen.any() and (seen | (value == -math.inf)).all())


@dataclass(frozen=True)
class _Coded:
    """What is recorded of a weight's codes: their spec, and the weight's [N, K]."""

    spec: TensorSpec
    shape: tuple[int, int]


def _recorded(gm: GraphModule) -> dict[str, _Coded]:
    """What is recorded of the codes at each path."""
    shapes = {site.path: site.shape for site in info(gm).sites}
    found: dict[str, _Coded] = {}
    for record in info(gm).site_records:
        weight = None if record.operand else Scheme.parse(record.spec).spec.weight
        if weight is not None and record.path in shapes:
            found[record.path] = _Coded(weight, shapes[record.path])
    for path, module in gm.named_modules():
        if isinstance(module, CodedLinear):
            shape = (module.out_features, module.in_features)
            found[f"{path}.codes"] = _Coded(module.spec, shape)
    return found


def _check_site(path: str, module: QuantizedParameters, coded: _Coded | None) -> None:
    tensors: dict[str, Tensor] = {
        name: getattr(module, name) for name, value in module._buffers.items() if value is not None
    }
    strangers = set(tensors) - {*_SCALES, *_NAMES, "like"}
    if strangers:
        raise CheckpointError(f"{path}: a quantized site has no {', '.join(sorted(strangers))}")
    for name in _SCALES:
        if name in tensors:
            _check_scale(path, name, tensors[name], (), FP32)
    shift = tensors.get("input_zero_point")
    if shift is not None and (shift.dtype != torch.int32 or shift.dim()):
        _fail(path, "input_zero_point", "one int32")
    if "weight" in tensors:
        if coded is None:
            raise CheckpointError(f"{path}: it holds codes, but nothing records their spec")
        _check_codes(path, tensors, coded)
    elif {"weight_scale", "weight_zero_point", "weight_sum", GLOBAL_SCALE} & set(tensors):
        raise CheckpointError(f"{path}: it holds scales, but no codes")


def _check_scale(
    path: str, name: str, scale: Tensor, shape: tuple[int, ...], kept: ScaleFormat
) -> None:
    if scale.dtype != kept.storage or tuple(scale.shape) != shape:
        _fail(path, name, f"{dtype_name(kept.storage)} of shape {list(shape)}")
    if not kept.valid(scale):
        _fail(path, name, "positive scales")


def _check_codes(path: str, tensors: dict[str, Tensor], coded: _Coded) -> None:
    spec, (rows, columns) = coded.spec, coded.shape
    grid, codes = spec.grid, tensors["weight"]
    dtype, width = grid.storage, columns
    if grid.packed:
        dtype, width = torch.uint8, -(-columns // 2)
    if codes.dtype != dtype or tuple(codes.shape) != (rows, width):
        _fail(path, "weight", f"{dtype} of shape {[rows, width]}")
    shape: tuple[int, ...] = () if spec.granularity == "tensor" else (rows, 1)
    if spec.group_size is not None:
        shape = (rows, group_count(columns, spec.group_size))
    if "weight_scale" not in tensors:
        _fail(path, "weight_scale", f"{dtype_name(spec.scale.storage)} of shape {list(shape)}")
    _check_scale(path, "weight_scale", tensors["weight_scale"], shape, spec.scale)
    if (GLOBAL_SCALE in tensors) is not spec.scale.two_level:
        _fail(path, GLOBAL_SCALE, "one exactly where the scales of groups share it")
    if spec.scale.two_level:
        _check_scale(path, GLOBAL_SCALE, tensors[GLOBAL_SCALE], (), FP32)
    shift, (low, high) = tensors.get("weight_zero_point"), grid.codes
    if (shift is None) is grid.has_zero_point:
        _fail(path, "weight_zero_point", "one exactly where codes are asymmetric")
    if shift is not None and (shift.dtype != torch.int32 or tuple(shift.shape) != shape):
        _fail(path, "weight_zero_point", f"int32 of shape {list(shape)}")
    if shift is not None and not _within(shift, low, high):
        _fail(path, "weight_zero_point", f"values within {low}..{high}")
    sums = []
    for some in codes.split(max(1, _ELEMENTS // max(1, columns))):
        block = grid.unpack(some, columns)
        if not grid.valid(block):
            _fail(path, "weight", f"codes within {low}..{high}, those of {grid.name}")
        if "weight_sum" in tensors:
            sums.append(_sums(block, spec.group_size))
    if sums:
        _check_sums(path, torch.cat(sums), shift, coded, tensors["weight_sum"])


def _sums(codes: Tensor, group_size: int | None) -> Tensor:
    """int32 sums of codes [n, K] over K, or over each group: [n, 1] or [n, G]."""
    return split_groups(codes, group_size).sum(-1, dtype=torch.int32)


def _check_sums(
    path: str, sums: Tensor, shift: Tensor | None, coded: _Coded, found: Tensor
) -> None:
    """``weight_sum`` is what integerize computes: the sums of (code - zero point)."""
    columns, size = coded.shape[1], coded.spec.group_size
    if shift is not None:
        lengths = [min(size, columns - i) for i in range(0, columns, size)] if size else [columns]
        sums = sums - shift * torch.tensor(lengths, dtype=torch.int32, device=sums.device)
    if not torch.equal(sums if size else sums.squeeze(1), found):
        _fail(path, "weight_sum", "the sums of the codes")


def _within(values: Tensor, low: int, high: int) -> bool:
    if not values.numel():
        return True
    least, most = (int(end) for end in torch.aminmax(values))
    return low <= least and most <= high


def _check_literals(gm: GraphModule, node: Node) -> None:
    """Ranges that stand on a node as numbers."""
    if is_op(node, OPS.quantize.default):
        call = operands(node)
        shift, low, high = call.zero_point, call.qmin, call.qmax
        _check_range(node, low, high)
        if call.dtype is not torch.int8:
            raise CheckpointError(f"node {node.name}: codes of {call.dtype} instead of int8")
        stored = isinstance(shift, Node) and shift.op == "get_attr"
        if stored and not _within(get_tensor(gm, shift), low, high):
            raise CheckpointError(f"{shift.target}: expected a value within {low}..{high}")
    elif is_op(node, OPS.choose_qparams.default):
        call = operands(node)
        _check_range(node, call.qmin, call.qmax)
        if type(call.symmetric) is not bool:
            raise CheckpointError(f"node {node.name}: symmetric is {call.symmetric!r}")
    elif is_op(node, OPS.store_kv.default):
        bits = operands(node).bits
        if type(bits) is not int or not 2 <= bits <= 8:
            raise CheckpointError(f"node {node.name}: a cache of {bits!r} bits instead of 2..8")
    elif is_op(node, OPS.store_kv_to.default) and operands(node).grid not in GRIDS:
        raise CheckpointError(f"node {node.name}: a cache of {operands(node).grid!r}")


def _check_range(node: Node, low: object, high: object) -> None:
    whole = type(low) is int and type(high) is int
    if not (whole and (low, high) in _RANGES):
        raise CheckpointError(f"node {node.name}: {low!r}..{high!r} is no range of 2 to 8 bits")
