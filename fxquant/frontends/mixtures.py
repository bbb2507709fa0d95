"""Mixtures of experts made dense: every expert computes every token, and the routing weighs.

Which expert a token goes to depends on its values, so the model's own way has no graph. The dense
one is the same function; it costs the experts that were not chosen. Experts that transformers
keeps in one 3-D parameter become modules of nn.Linear over views of it, at paths of ours.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.ir.sources import turned
from fxquant.ir.streamed import Sources

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """A module whose ``experts`` all run; ``views``: their matrices have paths of ours.

    ``transposed``: such a matrix lies [K, N] in the model's parameter.
    """

    path: str
    experts: int
    views: bool
    transposed: bool = False

    def __str__(self) -> str:
        text = f"all {self.experts} experts compute every token, and the routing weighs the results"
        if self.views:
            text += (
                "; each expert's matrices are parts of one parameter of the model, and their paths "
                "here are fxquant's"
            )
        return text


@torch.no_grad()
def make_dense(copy: nn.Module) -> tuple[Mixture, ...]:
    """Let every mixture of ``copy``, a clone of the user's model, be computed densely.

    Taken are experts of transformers' experts interface (5), GPT-OSS's (4), and blocks of a linear
    ``gate`` and a list of ``experts`` (4). Any other mixture stays as it is. Experts of a streamed
    model stay on meta; ``expert_sources`` says where each is read.
    """
    found = []
    for path, module in list(copy.named_modules()):
        interface = _has_interface(module)
        if interface or _is_clamped(module):
            transposed = bool(module.is_transposed) if interface else True
            found.append(Mixture(path, int(module.num_experts), True, transposed))
            _split(module, transposed)
            module.forward = types.MethodType(_experts if interface else _clamped, module)
        elif _is_block(module) and _computes_block(module):
            module.forward = types.MethodType(_block, module)
            found.append(Mixture(path, len(module.experts), views=False))
    return tuple(found)


def _has_interface(module: nn.Module) -> bool:
    matrix = module._parameters.get("down_proj")
    return hasattr(module, "_apply_gate") and matrix is not None and matrix.dim() == 3


def _is_clamped(module: nn.Module) -> bool:
    matrices = {f"{name}{part}" for name in _MATRICES[::2] for part in ("", "_bias")}
    return set(module._parameters) == matrices and hasattr(module, "alpha")


def _is_block(module: nn.Module) -> bool:
    parts = module._modules
    return (
        set(parts) == {"gate", "experts"}
        and isinstance(parts["gate"], nn.Linear)
        and isinstance(parts["experts"], nn.ModuleList)
        and isinstance(getattr(module, "top_k", None), int)
    )


def _computes_block(module: Any) -> bool:
    """Whether the module does what ``_block`` does, on random tokens; True where it has no data."""
    weight = module.gate.weight
    if weight.is_meta:
        return True
    hidden = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(weight.device, weight.dtype)
    try:
        (wanted, _), (found, _) = module(hidden), _block(module, hidden)
    except Exception:
        return False
    allowed = 16 * torch.finfo(weight.dtype).eps * float(wanted.abs().max())
    return bool(torch.allclose(found, wanted, rtol=0, atol=allowed))


def expert_sources(mixtures: Iterable[Mixture], sources: Sources) -> Sources:
    """Where the experts' own modules are read from, if ``sources`` holds those of their stacks."""
    found: Sources = {}
    for each in mixtures:
        stacks = sources.get(each.path, {}) if each.views else {}
        for index in range(each.experts):
            for name in _MATRICES:
                if name in stacks:
                    matrix = stacks[name].at(index)
                    own = {"weight": turned(matrix) if each.transposed else matrix}
                    if f"{name}_bias" in stacks:
                        own["bias"] = stacks[f"{name}_bias"].at(index)
                    found[f"{each.path}.{index}.{name}"] = own
    return found


def _split(experts: nn.Module, transposed: bool) -> None:
    """Add modules 0, 1, ... to ``experts``, each with an nn.Linear for each of its matrices."""
    matrices = {n: p for n in _MATRICES if (p := experts._parameters.get(n)) is not None}
    for index in range(int(experts.num_experts)):  # type: ignore[arg-type]
        expert = nn.Module()
        for name, matrix in matrices.items():
            weight = matrix.detach()[index]
            weight = weight.t() if transposed else weight
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            bias = experts._parameters.get(f"{name}_bias")
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach()[index], requires_grad=False)
            expert.add_module(name, linear.eval())
        experts.add_module(str(index), expert)


def _experts(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``hidden`` [tokens, width]; ``index`` and ``weights`` [tokens, chosen]."""
    outputs = []
    for expert in (self.get_submodule(str(i)) for i in range(self.num_experts)):  # type: ignore[arg-type]
        if self.has_gate:
            inner = self._apply_gate(expert.gate_up_proj(hidden))  # type: ignore[operator]
        else:
            inner = self.act_fn(expert.up_proj(hidden))  # type: ignore[operator]
        output = expert.down_proj(inner)  # type: ignore[operator]
        if self.has_post_expert_norm:
            output = self.post_expert_norm(output)  # type: ignore[operator]
        outputs.append(output)
    return _weighed(outputs, index, weights).to(hidden.dtype)


def _clamped(
    self: nn.Module, hidden: Tensor, router_indices: Tensor, routing_weights: Tensor
) -> Tensor:
    """``hidden`` [batch, length, width]; weights [tokens, experts], 0 where not chosen."""
    tokens = hidden.reshape(-1, hidden.shape[-1])
    outputs = []
    for expert in (self.get_submodule(str(i)) for i in range(self.num_experts)):  # type: ignore[arg-type]
        both = expert.gate_up_proj(tokens)  # type: ignore[operator]
        gate = both[..., ::2].clamp(max=self.limit)
        up = both[..., 1::2].clamp(min=-self.limit, max=self.limit)  # type: ignore[operator]
        inner = (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        outputs.append(expert.down_proj(inner))  # type: ignore[operator]
    return _sum(outputs, routing_weights).to(hidden.dtype).reshape(hidden.shape)


def _block(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, width = hidden_states.shape
    hidden = hidden_states.view(-1, width)
    logits = self.gate(hidden)  # type: ignore[operator]
    shares = nn.functional.softmax(logits, dim=1, dtype=torch.float32)
    weights, index = torch.topk(shares, self.top_k, dim=-1)  # type: ignore[arg-type]
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    outputs = [expert(hidden) for expert in self.experts]  # type: ignore[union-attr]
    result = _weighed(outputs, index, weights.to(hidden.dtype)).to(hidden.dtype)
    return result.reshape(batch, length, width), logits


def _weighed(outputs: list[Tensor], index: Tensor, weights: Tensor) -> Tensor:
    """The sum of each expert's [tokens, width], weighed where ``index`` names it, else by 0."""
    numbers = torch.arange(len(outputs), device=index.device)
    chosen = (index[:, :, None] == numbers[None, None]).to(weights.dtype)
    return _sum(outputs, (chosen * weights[:, :, None]).sum(1))


def _sum(outputs: list[Tensor], shares: Tensor) -> Tensor:
    """``shares`` [tokens, experts]."""
    total = outputs[0] * shares[:, 0, None]
    for number, output in enumerate(outputs[1:], 1):
        total = total + output * shares[:, number, None]
    return total
