"""New leaves in place of old ones: parameters change by replacement, never in place.

A graph shares its storage with the user's model, so what is written into a tensor would reach it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import SchemeError
from fxquant.ir.graph import ModuleT, install, linear_parameters
from fxquant.ir.leaves import CodedLinear, Conv1D
from fxquant.numerics.weight_codes import WeightCodes, min_max_codes
from fxquant.schemes.specs import TensorSpec
from fxquant.schemes.spelling import spell_weight


def with_parameters(module: ModuleT, **values: Tensor | None) -> ModuleT:
    """A copy of a leaf whose parameters of these names are ``values``; all else is shared.

    A name of a buffer stays one.
    """
    other = copy.copy(module)
    other._parameters, other._buffers = dict(module._parameters), dict(module._buffers)
    for name, value in values.items():
        if name in other._buffers:
            other._buffers[name] = None if value is None else value.detach()
        else:
            other._parameters[name] = None if value is None else nn.Parameter(value.detach(), False)
    return other


def install_weight(
    gm: GraphModule, path: str, weight: Tensor, bias: Tensor | None, origin: str
) -> None:
    """Give the linear at ``path`` another weight [N, K], in its own layout, and another bias.

    Raises SchemeError where a repair has chosen the linear's codes: they would be lost.
    """
    module = gm.get_submodule(path)
    if isinstance(module, CodedLinear):
        raise SchemeError(
            f"{origin}: {path}: an earlier pass has chosen its codes, and {origin} would change "
            f"the weight under them; write +{origin} before that pass"
        )
    assert isinstance(module.weight, Tensor)
    stored = weight.t() if isinstance(module, Conv1D) else weight
    dtype = module.weight.dtype
    install(
        gm,
        path,
        with_parameters(
            module,
            weight=stored.to(dtype).contiguous(),
            bias=None if bias is None else bias.to(dtype),
        ),
    )


def choose_codes(
    gm: GraphModule,
    path: str,
    spec: TensorSpec,
    choose: Callable[[Tensor], WeightCodes],
    origin: str,
) -> bool:
    """Give the linear at ``path`` the codes that ``choose`` makes of its weight [N, K].

    Returns whether they differ from those that rounding to nearest gives. Raises SchemeError where
    a repair has chosen the linear's codes: they would be lost.
    """
    module = gm.get_submodule(path)
    if isinstance(module, CodedLinear):
        raise SchemeError(
            f"{origin}: {path}: an earlier pass has chosen its codes; write +{origin} before it"
        )
    weight, bias = linear_parameters(module)
    nearest, chosen = min_max_codes(weight, spec, path), choose(weight)
    install(gm, path, CodedLinear(weight, bias, spec, chosen.tensors()))
    return not torch.equal(nearest.codes, chosen.codes)


def check_chosen(module: nn.Module, spec: TensorSpec, site: str) -> None:
    """Raise SchemeError where a repair chose the site's codes for another spec."""
    if isinstance(module, CodedLinear) and module.spec != spec:
        raise SchemeError(
            f"{site}: a repair of this graph has chosen its codes as {spell_weight(module.spec)}, "
            f"the scheme asks for {spell_weight(spec)}: start from the model or from "
            "fxquant.trace(model) for another scheme"
        )


def site_codes(module: nn.Module, spec: TensorSpec, site: str) -> WeightCodes:
    """The codes that a repair chose for the site, else its weight rounded to nearest.

    Raises SchemeError if they were chosen for another spec.
    """
    check_chosen(module, spec, site)
    weight = linear_parameters(module)[0]
    if not isinstance(module, CodedLinear):
        return min_max_codes(weight, spec, site)
    # By attribute: streamed buffers are on meta.
    tensors = {name: getattr(module.codes, name) for name, _ in module.codes.named_buffers()}
    return WeightCodes.read(tensors, spec, weight.shape[1])
