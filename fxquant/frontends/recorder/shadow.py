"""A copy of a model with fake tensors for weights: the model's structure and code, no data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shadow:
    """``model`` as it was, but for its fake parameters and buffers of the same shapes.

    ``input_ids`` and ``attention_mask``, int64 [batch, length] with sizes that are symbols: the
    inputs to run it on. ``marker``: the dtype that parameters of the model's own dtype have here;
    None where they have just that dtype.
    """

    model: nn.Module
    mode: FakeTensorMode
    input_ids: Tensor
    attention_mask: Tensor
    marker: torch.dtype | None

    @property
    def env(self) -> ShapeEnv:
        """What has been found out about the sizes."""
        found = self.mode.shape_env
        assert found is not None
        return found


def markers(model: nn.Module) -> tuple[torch.dtype | None, ...]:
    """The markers to try one after the other.

    A graph must follow ``half()``, so a constant that is the model's own dtype has to be told from
    one that is that dtype by chance. A half model's own dtype tells it well enough. A float32 model
    is recorded as a bfloat16 one, which its code may not allow: then with the dtype that it has.
    """
    return (dtype,) if (dtype := _own_dtype(model)) in _HALF else (torch.bfloat16, None)


def shadow_of(model: nn.Module, marker: torch.dtype | None) -> Shadow:
    """The shadow of ``model``, which stays as it is; what is on meta is on the CPU there."""
    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    own = _own_dtype(model)
    memo: dict[int, object] = {}
    device = torch.device("cpu")
    with mode:
        for tensor in _tensors(model):
            marked = marker is not None and isinstance(tensor, nn.Parameter) and tensor.dtype == own
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            fake = torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=marker if marked else tensor.dtype,
                device=device,
            )
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if parameter else fake
    shadow = copy.deepcopy(model, memo).eval()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)  # type: ignore[var-annotated]
    ids = mode.from_tensor(
        torch.ones(3, 11, dtype=torch.int64, device=device), symbolic_context=context
    )
    with mode:
        mask = torch.ones_like(ids)  # of the same two symbols
    return Shadow(shadow, mode, ids, mask, marker)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _own_dtype(model: nn.Module) -> torch.dtype | None:
    found = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(found, None)
