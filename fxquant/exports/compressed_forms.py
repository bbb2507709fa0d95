"""The forms that compressed-tensors has for weights and inputs: which one holds a spec, and which
spec is the nearest that one holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from fxquant.exports.target import Refusal, nearest_group, regrouped
from fxquant.formats.floating import E2M1, E2M3, E3M2, E4M3, FloatGrid
from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid, integer
from fxquant.formats.scales import E4M3_SCALE, FP32, POWERS, PowerScale
from fxquant.numerics.quantization import group_count
from fxquant.schemes.specs import ActivationSpec, SiteSpec, TensorSpec
from fxquant.schemes.spelling import spell_site

MX_GROUP, NV_GROUP = 32, 16
_BYTES: Final = (E4M3, E3M2, E2M3)  # whose numbers are all numbers of E4M3
_INPUTS: Final = (E4M3, E2M1)


@dataclass(frozen=True)
class Form:
    """How a weight's codes lie in the file.

    Attributes:
        alone, with_inputs: names of the format where inputs are floats and where they are codes.
        bits: of a code there; None for integers, which have 4 or 8.
        scale_dtype: of the groups' scales, as the config spells it; None for fp32.
        in_bfloat16: whether the library makes the weight a bfloat16 tensor, whatever the model is.
    """

    alone: str
    with_inputs: str
    bits: int | None
    scale_dtype: str | None = None
    in_bfloat16: bool = False


INTEGERS: Final = Form("pack-quantized", "int-quantized", None)
BYTES: Final = Form("naive-quantized", "float-quantized", 8)
MX8: Final = Form("mxfp8-quantized", "mxfp8-quantized", 8, "torch.uint8", in_bfloat16=True)
MX4: Final = Form("mxfp4-pack-quantized", "mxfp4-pack-quantized", 4, MX8.scale_dtype, True)
NV4: Final = Form(
    "nvfp4-pack-quantized", "nvfp4-pack-quantized", 4, "torch.float8_e4m3fn", in_bfloat16=True
)


def form_of(weight: TensorSpec, length: int) -> Form | None:
    """The form that holds rows of ``length`` columns, None if none does."""
    if isinstance(weight.grid, IntegerGrid):
        return INTEGERS if nearest_group(weight, length) is None else None
    size, powers = weight.group_size, isinstance(weight.scale, PowerScale)
    of_mx = powers and size == MX_GROUP and length % MX_GROUP == 0
    if weight.grid in _BYTES:
        if of_mx:
            return MX8
        return BYTES if nearest_group(weight, length) is None else None
    if weight.grid != E2M1:
        return None
    if of_mx:
        return MX4
    # The library makes one of rows of a single group in another dtype, which no linear takes.
    of_nv = weight.scale == E4M3_SCALE and size == NV_GROUP and length > NV_GROUP
    return NV4 if of_nv and length % NV_GROUP == 0 else None


def format_of(spec: SiteSpec, form: Form) -> str:
    """The name of the format of a site."""
    if spec.activation is None:
        return form.alone
    if form is INTEGERS and not isinstance(spec.activation.tensor.grid, IntegerGrid):
        return form.alone  # what engines read of integers beside inputs of floats
    return form.with_inputs


def container(spec: TensorSpec, form: Form) -> int:
    """Bits that a code has there."""
    return form.bits or (4 if spec.grid.bits <= 4 else 8)


def fixes_global_scale(activation: ActivationSpec | None) -> bool:
    """Whether the engine divides an input by a global scale, which calibration data give."""
    return activation is not None and activation.tensor.scale.two_level


def site_refusal(spec: SiteSpec, length: int, calibrated: bool) -> Refusal | None:
    """Why no form holds ``spec`` at a linear of ``length`` columns, ``calibrated``: whether there
    are data for what the engine fixes; with the nearest that is held."""
    assert spec.weight is not None
    weight = _held_weight(spec.weight, length)
    activation = None if spec.activation is None else _held_input(spec.activation, length)
    reason = None
    if form_of(spec.weight, length) is None:
        reason = _weight_reason(spec.weight, length)
    elif activation != spec.activation and spec.activation is not None:
        reason = _input_reason(spec.activation.tensor, length)
    elif fixes_global_scale(activation) and not calibrated:
        reason = (
            "the global scale of an input is fixed there, on calibration data, and none are given "
            "(fxquant export and evaluate of the float model read some; from Python, calibration=)"
        )
    if reason is None:
        return None
    if fixes_global_scale(activation) and not calibrated:
        activation = None
    return Refusal(reason, spell_site(SiteSpec(weight, activation)))


def _weight_reason(weight: TensorSpec, length: int) -> str:
    if weight.grid == E2M1:
        return (
            f"codes of e2m1 are in groups of {NV_GROUP} under e4m3 scales there, two or more a "
            f"row, or of {MX_GROUP} under powers of two, and fill its {length} columns"
        )
    if weight.grid not in _BYTES and not isinstance(weight.grid, IntegerGrid):
        return f"codes of {weight.grid.name} have no form there"
    ragged = nearest_group(weight, length)
    assert ragged is not None
    return ragged.reason


def _held_weight(weight: TensorSpec, length: int) -> TensorSpec:
    """The nearest weight that a form holds; itself where one does."""
    if form_of(weight, length) is not None:
        return weight
    grid = weight.grid
    if grid == E2M1:
        found = _packed_floats(weight, length)
        return found or _fitting(replace(weight, grid=E4M3), length)
    if isinstance(grid, FloatGrid) and grid not in _BYTES:
        weight = replace(weight, grid=E4M3)
    elif not isinstance(grid, FloatGrid | IntegerGrid):
        weight = replace(weight, grid=integer(grid.bits))
    return _fitting(weight, length)


def _packed_floats(weight: TensorSpec, length: int) -> TensorSpec | None:
    """E2M1 in the groups of MX or of NVFP4, whichever is nearer and fills the rows."""
    size = weight.group_size or length
    scale = weight.scale if isinstance(weight.scale, PowerScale) else POWERS[0]
    mx = TensorSpec(E2M1, "group", MX_GROUP, scale)
    nv = TensorSpec(E2M1, "group", NV_GROUP, E4M3_SCALE)
    fine = size <= NV_GROUP or weight.scale.two_level
    held = [each for each in ((nv, mx) if fine else (mx, nv)) if form_of(each, length)]
    return held[0] if held else None


def _fitting(spec: TensorSpec, length: int) -> TensorSpec:
    """Groups that divide the rows; one scale a row where only single columns do."""
    fits = nearest_group(spec, length) is None
    return spec if fits else regrouped(spec, length, "channel")


def _input_reason(tensor: TensorSpec, length: int) -> str:
    if not _is_input_grid(tensor.grid):
        return f"engines run inputs of int8, e4m3 or e2m1, not of {tensor.grid.name}"
    size = tensor.group_size
    if size is not None and length % size:
        return f"groups of {size} do not divide its {length} columns"
    if isinstance(tensor.scale, PowerScale):
        return f"powers of two are the scales of floats there, in groups of {MX_GROUP} of an input"
    if tensor.scale.two_level:
        return f"an input's e4m3 scales are those of e2m1 in groups of {NV_GROUP} there"
    return f"scales in {tensor.scale.name} are no input's there"


def _held_input(activation: ActivationSpec, length: int) -> ActivationSpec:
    """The nearest input that is held; itself where it is."""
    tensor = activation.tensor
    if not _is_input_grid(tensor.grid):
        if not isinstance(tensor.grid, FloatGrid):
            return ActivationSpec(TensorSpec(integer(8), "token"))
        tensor = replace(tensor, grid=E4M3)
    if tensor.group_size is not None and length % tensor.group_size:
        tensor = regrouped(replace(tensor, scale=FP32), length, "token")
    if not _has_scales(tensor):
        tensor = replace(tensor, scale=FP32)
    return replace(activation, tensor=tensor)


def _is_input_grid(grid: Grid) -> bool:
    return grid in _INPUTS or (isinstance(grid, IntegerGrid) and grid.bits == 8)


def _has_scales(tensor: TensorSpec) -> bool:
    if isinstance(tensor.scale, PowerScale):
        return isinstance(tensor.grid, FloatGrid) and tensor.group_size == MX_GROUP
    if tensor.scale.two_level:
        return tensor.grid == E2M1 and tensor.group_size == NV_GROUP
    return tensor.scale == FP32


def weight_arguments(weight: TensorSpec, form: Form, length: int) -> dict[str, Any]:
    """QuantizationArgs of a weight, as config.json has them."""
    found = _arguments(container(weight, form), weight, "channel", False, form.scale_dtype)
    size = weight.group_size
    if size is not None and (form.scale_dtype or group_count(length, size) > 1):
        found |= {"strategy": "tensor_group" if form is NV4 else "group", "group_size": size}
    return found


def input_arguments(activation: ActivationSpec) -> dict[str, Any]:
    """QuantizationArgs of an input."""
    tensor, dtype = activation.tensor, None
    dynamic: bool | str = activation.dynamic
    strategy = str(tensor.granularity)
    if tensor.scale.two_level:
        strategy, dynamic, dtype = "tensor_group", "local", NV4.scale_dtype
    elif isinstance(tensor.scale, PowerScale):
        dtype = MX8.scale_dtype
    found = _arguments(tensor.grid.bits, tensor, strategy, dynamic, dtype)
    return found | {"group_size": tensor.group_size}


def _arguments(
    bits: int, spec: TensorSpec, strategy: str, dynamic: bool | str, scale_dtype: str | None
) -> dict[str, Any]:
    found = {
        "num_bits": bits,
        "type": "int" if isinstance(spec.grid, IntegerGrid) else "float",
        "symmetric": not spec.grid.has_zero_point,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
    }
    return found | ({} if scale_dtype is None else {"scale_dtype": scale_dtype})
