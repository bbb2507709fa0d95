"""Leaf modules as JSON: an explicit table of kinds, each with the attributes that make it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.checkpoint.dataclass_json import from_json, to_json
from fxquant.errors import CheckpointError
from fxquant.ir.leaves import (
    CodedLinear,
    Conv1D,
    FloatColumns,
    Fp32Linear,
    InverseScale,
    OnlineRotation,
    OutlierIndex,
    QuantizedParameters,
)
from fxquant.ir.streamed import plain_type
from fxquant.schemes.specs import TensorSpec


class Role(NamedTuple):
    """What a name of a module stands for; not ``there``: it is None."""

    parameter: bool
    there: bool


ROLES = {
    "parameter": Role(parameter=True, there=True),
    "buffer": Role(parameter=False, there=True),
    "none parameter": Role(parameter=True, there=False),
    "none buffer": Role(parameter=False, there=False),
}
_SPELLED = {role: text for text, role in ROLES.items()}


@dataclass(frozen=True)
class Kind:
    """A module class and its plain attributes by name, with their annotations."""

    type: type[nn.Module]
    attributes: tuple[tuple[str, Any], ...] = ()


_LINEAR = (("in_features", int), ("out_features", int))
_NORM = (
    ("normalized_shape", tuple[int, ...]),
    ("eps", float | None),
    ("elementwise_affine", bool),
)
_EMBEDDING = (
    ("num_embeddings", int),
    ("embedding_dim", int),
    ("padding_idx", int | None),
    ("max_norm", float | None),
    ("norm_type", float),
    ("scale_grad_by_freq", bool),
    ("sparse", bool),
)
_CONVOLUTION = (
    ("in_channels", int),
    ("out_channels", int),
    ("kernel_size", tuple[int, ...]),
    ("stride", tuple[int, ...]),
    ("padding", tuple[int, ...]),
    ("dilation", tuple[int, ...]),
    ("output_padding", tuple[int, ...]),
    ("groups", int),
    ("padding_mode", Literal["zeros"]),
)
KINDS = {
    kind.type.__name__: kind
    for kind in (
        Kind(nn.Module),  # a container on the way to a leaf
        Kind(nn.Linear, _LINEAR),
        Kind(Conv1D, (("nf", int), ("nx", int))),
        Kind(nn.Embedding, _EMBEDDING),
        Kind(nn.Conv1d, _CONVOLUTION),
        Kind(nn.LayerNorm, _NORM),
        Kind(nn.RMSNorm, _NORM),
        Kind(nn.ReLU, (("inplace", bool),)),
        Kind(nn.ReLU6, (("inplace", bool), ("min_val", float), ("max_val", float))),
        Kind(nn.SiLU, (("inplace", bool),)),
        Kind(nn.Mish, (("inplace", bool),)),
        Kind(nn.LeakyReLU, (("negative_slope", float), ("inplace", bool))),
        Kind(nn.GELU, (("approximate", str),)),
        Kind(nn.Tanh),
        Kind(nn.Sigmoid),
        Kind(QuantizedParameters),
        Kind(CodedLinear, (*_LINEAR, ("spec", TensorSpec))),
        Kind(Fp32Linear),
        Kind(InverseScale),
        Kind(FloatColumns, (("site", str),)),
        Kind(OutlierIndex),
        Kind(OnlineRotation),
    )
}


def encode_module(path: str, module: nn.Module) -> dict[str, Any]:
    """``{"kind", "options", "tensors"}``; CheckpointError for a class that is not in KINDS."""
    root = isinstance(module, GraphModule)
    name = "Module" if root else plain_type(module).__name__
    kind = KINDS.get(name)
    if kind is None or not (root or plain_type(module) is kind.type):
        raise CheckpointError(
            f"{path}: a module of class {type(module).__module__}.{name} cannot be saved: "
            f"known are {', '.join(KINDS)}"
        )
    tensors = {
        name: _SPELLED[Role(values is module._parameters, value is not None)]
        for values in (module._parameters, module._buffers)
        for name, value in values.items()
    }
    options = {option: to_json(getattr(module, option)) for option, _ in kind.attributes}
    encoded = {"kind": name, "options": options, "tensors": tensors}
    return {key: value for key, value in encoded.items() if value or key == "kind"}


def decode_module(path: str, data: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The module in eval mode, with ``tensors`` (by name, parameters or not) as they are.

    No constructor of the class runs: the recorded attributes and tensors are the whole of it.
    Raises CheckpointError for an unknown kind, and where attributes and tensors do not fit.
    """
    called = data.get("kind")
    kind = KINDS.get(called) if isinstance(called, str) else None
    if kind is None or set(data) - {"kind", "options", "tensors"}:
        raise CheckpointError(
            f"{path}: modules of kind {str(called)[:80]!r} may not stand in a graph, or have other "
            "fields than kind, options and tensors"
        )
    module: nn.Module = kind.type.__new__(kind.type)
    nn.Module.__init__(module)
    options = data.get("options", {})
    expected = dict(kind.attributes)
    if not isinstance(options, dict) or set(options) != set(expected):
        raise CheckpointError(f"{path}: a {called} has options {', '.join(expected)}")
    for name, value in options.items():
        option = from_json(expected[name], _named_grid(value) if name == "spec" else value)
        if isinstance(option, float) and not math.isfinite(option):
            raise CheckpointError(f"{path}: {name} is {option}")
        setattr(module, name, option)
    register_tensors(module, data.get("tensors", {}), tensors)
    _check_leaf(path, module)
    return module.eval()


def _check_leaf(path: str, module: nn.Module) -> None:
    """CheckpointError where a leaf's attributes and tensors do not go together."""
    expected: dict[str, tuple[int, ...]] | None = None
    if isinstance(module, Conv1D):
        expected = {"weight": (module.nx, module.nf), "bias": (module.nf,)}
    elif isinstance(module, nn.Linear):
        rows = module.out_features
        expected = {"weight": (rows, module.in_features), "bias": (rows,)}
    elif isinstance(module, nn.Conv1d):
        groups, rows = max(module.groups, 1), module.out_channels
        columns = (module.in_channels // groups, *module.kernel_size)
        expected = {"weight": (rows, *columns), "bias": (rows,)}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        expected = dict.fromkeys(("weight", "bias"), module.normalized_shape)
    elif isinstance(module, nn.Embedding):
        expected = {"weight": (module.num_embeddings, module.embedding_dim)}
        row = module.padding_idx
        if module.max_norm is not None or (row is not None and row >= module.num_embeddings):
            raise CheckpointError(f"{path}: an embedding that rescales itself, or pads beyond it")
    found = {**module._parameters, **module._buffers}
    for name, value in found.items():
        if expected is not None and value is not None and tuple(value.shape) != expected.get(name):
            raise CheckpointError(
                f"{path}.{name}: shape {list(value.shape)}, its module is made for "
                f"{list(expected.get(name, ()))}"
            )


def _named_grid(spec: Any) -> Any:
    """A spec of format version 1, which has bits and symmetric, as one that names its grid."""
    if not (isinstance(spec, dict) and {"bits", "symmetric"} <= set(spec)):
        return spec
    grid = f"int{spec['bits']}{'' if spec['symmetric'] else '-asym'}"
    rest = {key: value for key, value in spec.items() if key not in ("bits", "symmetric")}
    return {"grid": grid, **rest}


def register_tensors(module: nn.Module, roles: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Register ``tensors`` as the parameters and buffers that ``roles``, names of ROLES, says."""
    for name, role in roles.items():
        value = tensors.get(name)
        if ROLES[role].parameter:
            if value is not None and not value.is_floating_point():
                raise CheckpointError(f"a parameter {name} of {value.dtype}, which floats are")
            parameter = value if isinstance(value, nn.Parameter | None) else nn.Parameter(value)
            module.register_parameter(name, parameter)
        else:
            module.register_buffer(name, value)
