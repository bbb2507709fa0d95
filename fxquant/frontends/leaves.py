"""Which modules of a settled copy stay whole in a graph, and as what."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fxquant.ir import leaves as own

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own or a Conv1D; linear layers by other names are
    nn.Linear in a settled copy."""
    if type(module).__module__.startswith("torch.nn."):
        return not isinstance(module, _CONTAINERS)
    return type(module) is Conv1D


def as_leaf(module: Any) -> Any:
    """A leaf or tensor as graphs have it: nothing below the front end knows transformers' classes.

    The parameters are the same objects.
    """
    if type(module) is Conv1D:
        return own.Conv1D(module.weight, module.bias).train(module.training)
    return module
