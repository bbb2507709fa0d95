"""Which modules of a user's model stay whole in a graph, and as what."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fxquant.ir import leaves as own

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own, a Conv1D or a linear layer by another name.

    Not where its ``forward`` was replaced, or its weights are computed by parametrizations: what
    it does then is in the code around it.
    """
    if "forward" in vars(module) or hasattr(module, "parametrizations"):
        return False
    if type(module).__module__.startswith("torch.nn."):
        return not isinstance(module, _CONTAINERS)
    return type(module) is Conv1D or is_linear(module)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module``, of a subclass of nn.Linear, computes what an nn.Linear computes."""
    if not isinstance(module, nn.Linear) or [n for n, _ in module.named_parameters()] not in (
        ["weight"],
        ["weight", "bias"],
    ):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    # Small weights tell as much: what asks for in_features too is traced through.
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (3, 5), "bias": (3,)}
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        value = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    probe = copy.deepcopy(module, memo).eval()
    x = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    try:
        found = probe(x)
    except Exception:
        return False
    wanted = functional.linear(x, probe.weight, probe.bias)
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool(torch.allclose(found, wanted, rtol=0, atol=1e-9))


def as_leaf(module: Any) -> Any:
    """A leaf or tensor as graphs have it: nothing below the front end knows transformers' classes.

    The parameters are the same objects.
    """
    if type(module) is Conv1D:
        return own.Conv1D(module.weight, module.bias).train(module.training)
    if isinstance(module, nn.Linear) and not type(module).__module__.startswith("torch.nn."):
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight, linear.bias = module.weight, module.bias
        return linear.train(module.training)
    return module
