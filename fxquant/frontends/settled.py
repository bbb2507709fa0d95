"""A copy of a model in the plainest form of the same function: weights that are computed at each
call become values, and modules that are linear layers in all but name become nn.Linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

from fxquant.errors import ModelError

# Forward pre-hooks that do nothing but compute a weight from other parameters.
WEIGHT_HOOKS: tuple[type, ...] = (BasePruningMethod, WeightNorm, SpectralNorm)
_PARTS = ("_orig", "_mask", "_g", "_v", "_u")  # what they compute it from, behind its name
# Inputs of several sizes: what clips, or quantizes its input, is no linear layer.
_SIZES = (0.01, 1.0, 16.0)


@torch.no_grad()
def settle(copy: nn.Module) -> None:
    """Bring ``copy``, a clone in eval mode, to the plain form, without hooks.

    Pruning, weight_norm, spectral_norm and parametrizations become the weights that they make now.
    A module without children whose only parameters are a matrix ``weight`` and perhaps a ``bias``,
    and which computes ``x W^T + b`` or ``x W + b`` (tried on random inputs), becomes nn.Linear.
    Raises ModelError where torch's own linear layer computes something else.
    """
    for module in list(copy.modules()):
        _compute_weights(module)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    plain: dict[nn.Module, nn.Module | None] = {}
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            if child not in plain:
                plain[child] = _as_linear(child)
            if (found := plain[child]) is not None:
                parent._modules[name] = found
    _check_torch(copy)


def _compute_weights(module: nn.Module) -> None:
    for number, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WEIGHT_HOOKS):
            hook(module, ())
            del module._forward_pre_hooks[number]
            name = getattr(hook, "_tensor_name", None) or hook.name  # type: ignore[attr-defined]
            for part in _PARTS:
                module._parameters.pop(f"{name}{part}", None)
                module._buffers.pop(f"{name}{part}", None)
            _hold(module, name, module.__dict__.pop(name))
    if parametrize.is_parametrized(module):
        made: Any = module.parametrizations
        values = {name: (getattr(module, name), bool(made[name]._parameters)) for name in made}
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        for name, (value, of_parameters) in values.items():
            if of_parameters:
                _hold(module, name, value)
            else:
                module.register_buffer(name, value.detach())


def _hold(module: nn.Module, name: str, value: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))


def _as_linear(module: nn.Module) -> nn.Linear | None:
    """The nn.Linear that computes what ``module`` does; None for one already, or for another kind.

    Its parameters are those of ``module``, ties kept; a weight stored [K, N] is seen transposed.
    """
    names = set(module._parameters)
    if type(module) in (nn.Linear, Conv1D) or isinstance(module, nn.Embedding):
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() != 2 or names - {"weight", "bias"} or module._modules:
        return None
    if _computes(module, lambda w: w):
        return _linear(weight, bias)
    if _computes(module, Tensor.t):
        return _linear(nn.Parameter(weight.t(), requires_grad=False), bias)
    return None


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear.eval()


def _check_torch(copy: nn.Module) -> None:
    """What is taken for a linear layer by its class must be one: classes can be patched too."""
    for kind, seen in ((nn.Linear, lambda w: w), (Conv1D, Tensor.t)):
        one = next((module for module in copy.modules() if type(module) is kind), None)
        if one is not None and not _computes(one, seen):
            raise ModelError(
                f"{kind.__module__}.{kind.__name__}.forward was replaced: it computes no linear "
                "layer any more, and quantizing replaces it by one; put the change into a class"
            )


def _computes(module: nn.Module, seen: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``module`` computes ``x W^T + b``, W [N, K] its weight as ``seen``, on random inputs
    [1, 3, K]. A weight on meta (streamed) is tried with random values in its place."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    kept = dict(module._parameters)
    try:
        for name, value in kept.items():
            if value is not None and value.is_meta:
                filled = nn.Parameter(random(*value.shape).to(value.dtype), requires_grad=False)
                module._parameters[name] = filled
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        matrix = seen(weight)
        x = (
            random(len(_SIZES), matrix.shape[1])
            * torch.tensor(_SIZES, dtype=torch.float32)[:, None]
        )
        x = x[None].to(weight.device, weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            found = module(x)
            wanted = nn.functional.linear(x, matrix, bias)
    except Exception:  # it takes other inputs than a linear layer
        return False
    finally:
        module._parameters = kept
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    allowed = max(1e-4, 16 * torch.finfo(weight.dtype).eps) * wanted.abs().amax(-1, keepdim=True)
    return bool(((found - wanted).abs() <= allowed).all())
