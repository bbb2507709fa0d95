"""The graph under compressed-tensors' arithmetic, as transformers runs it: float products of
dequantized operands, and that library's own rule for an input's codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.exports.check import in_float32
from fxquant.exports.sites import CodedSite, coded_sites
from fxquant.ir.operands import operands

_LOWEST, _HIGHEST = -128, 127
_HELD = "fxquant_engine"


def under_engine_rules(gm: GraphModule) -> GraphModule:
    """A copy of ``gm`` in which every coded site multiplies as the engine does."""
    copy = in_float32(gm)
    for number, site in enumerate(list(coded_sites(copy))):
        quantize = site.quantize
        if quantize is None:
            continue  # the graph multiplies by the dequantized weight too
        copy.add_submodule(f"{_HELD}.site_{number}", _Linear(site))
        x = operands(quantize).x
        with copy.graph.inserting_before(site.output):
            y = copy.graph.create_node("call_module", f"{_HELD}.site_{number}", (x,))
        site.output.replace_all_uses_with(y)
        copy.graph.erase_node(site.output)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


class _Linear(nn.Module):
    """A linear whose input is quantized and dequantized by the engine's rule."""

    def __init__(self, site: CodedSite) -> None:
        super().__init__()
        assert site.spec.activation is not None
        spec = site.spec.activation.tensor
        self.symmetric, self.token = not spec.grid.has_zero_point, spec.granularity == "token"
        self.static = site.static_input()
        bias = site.bias()
        self.weight = site.codes().dequantize()
        self.bias = None if bias is None else bias.float()
        self.shares_a_scale = False

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self._range(x) if self.static is None else self.static
        steps = x / scale
        if zero_point is not None:
            steps = steps + zero_point.to(x.dtype)
        codes = torch.round(torch.clamp(steps, _LOWEST, _HIGHEST))
        if zero_point is not None:
            codes = codes - zero_point.to(x.dtype)
        return nn.functional.linear(codes * scale, self.weight, self.bias)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dynamic scale and zero point. A "token" is what shares the first two dimensions: of an
        input [tokens, K] that is each element, and the engine takes the whole instead."""
        axes = tuple(range(2, x.dim())) if self.token else ()
        self.shares_a_scale |= self.token and not axes
        if axes:
            low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        else:
            low, high = x.min(), x.max()
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(low.abs(), high.abs()) / 127.5
            return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale), None
        scale = (high - low) / 255.0
        zero_point = torch.round((_LOWEST - low / scale).clamp(_LOWEST, _HIGHEST))
        return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale), zero_point


def take_buffers(ruled: GraphModule, gm: GraphModule, engine: nn.Module) -> list[str]:
    """Give ``ruled`` the buffers that the engine computes itself and no checkpoint holds, such as
    rotary frequencies. Returns how those of ``gm`` differ, in words."""
    stored, said = engine.state_dict().keys(), []
    for name, value in engine.named_buffers():
        path, _, own = name.rpartition(".")
        held = dict(gm.named_buffers()).get(name)
        if name in stored or held is None or torch.equal(held.cpu().float(), value.float()):
            continue
        if not torch.equal(value.cpu().to(held.dtype), held.cpu()):
            continue  # another function than the graph's: the check is to fail
        setattr(ruled.get_submodule(path), own, value)
        kept, dtype = (str(each.dtype).removeprefix("torch.") for each in (held, value))
        said.append(f"{name} is in {kept} here, in {dtype} there")
    return said


def cause(ruled: GraphModule, reasons: list[str]) -> str:
    """Why the engine's logits are not the graph's, from what ran under its rules and ``reasons``
    that are known."""
    linears = [module for module in ruled.modules() if isinstance(module, _Linear)]
    if not linears:
        return "; ".join([*reasons, "float sums in another order"])
    reasons = list(reasons)
    symmetric = [linear for linear in linears if linear.symmetric]
    if symmetric:
        reasons.append("symmetric codes reach -128 there, -127 here")
    if any(linear.static is None for linear in symmetric):
        reasons.append("a dynamic scale is absmax/127.5 there, absmax/127 here")
    if len(symmetric) < len(linears):
        reasons.append("a code is rounded after its zero point is added there, before it here")
    if any(linear.shares_a_scale for linear in linears):
        reasons.append("an input [tokens, K] has one scale there, one a token here")
    return "; ".join([*reasons, "sums are of floats there"])
