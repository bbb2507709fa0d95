"""The graph under compressed-tensors' arithmetic, as transformers runs it: float products of
dequantized operands, and that library's own rules for codes of inputs and numbers of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.exports.check import in_float32
from fxquant.exports.compressed_forms import NV4, form_of
from fxquant.exports.compressed_inputs import EngineInput, reciprocal
from fxquant.exports.sites import CodedSite, coded_sites
from fxquant.frontends.pretrained import read_written
from fxquant.ir.operands import operands

_HELD = "fxquant_engine"


def read_engine(folder: Path) -> PreTrainedModel:
    """What transformers runs of the checkpoint, in float32.

    The library makes some weights bfloat16 tensors (``Form.in_bfloat16``), which no linear of a
    float32 model takes: they go on in float32, as they are.
    """
    engine = read_written(folder).eval()
    engine.hf_quantizer.compressor.decompress_model(engine)
    for parameter in engine.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    return engine


def engine_logits(engine: PreTrainedModel, ids: Tensor) -> Tensor:
    """Without a compiler, to the same numbers: the library compiles what makes codes of e2m1."""
    with torch.compiler.set_stance("force_eager"):
        logits: Tensor = engine(input_ids=ids, use_cache=False).logits
    return logits


def under_engine_rules(gm: GraphModule, fixed: Mapping[str, Tensor]) -> GraphModule:
    """A copy of ``gm`` in which every coded site multiplies as the engine does; ``fixed``: the
    global scales of inputs, by site."""
    copy = in_float32(gm)
    for number, site in enumerate(list(coded_sites(copy))):
        quantize = site.quantize
        if quantize is None and not _rounds_weight(site):
            continue  # the graph multiplies by the dequantized weight too
        linear = _Linear(site, fixed.get(site.path))
        copy.add_submodule(f"{_HELD}.site_{number}", linear)
        x = operands(site.output).input if quantize is None else operands(quantize).x
        with copy.graph.inserting_before(site.output):
            y = copy.graph.create_node("call_module", f"{_HELD}.site_{number}", (x,))
        site.output.replace_all_uses_with(y)
        copy.graph.erase_node(site.output)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def _rounds_weight(site: CodedSite) -> bool:
    return form_of(site.weight_spec, site.site.shape[1]) is NV4


def _weight(site: CodedSite) -> Tensor:
    """float32 [N, K]: the numbers that the engine multiplies by."""
    held = site.codes()
    if not _rounds_weight(site):
        return held.dequantize()
    stored = held.spec.scale.encode(held.scales, held.global_scale)
    scales = stored.to(torch.float32) / reciprocal(held.global_scale)
    return replace(held, scales=scales).dequantize(torch.bfloat16).to(torch.float32)


class _Linear(nn.Module):
    """A linear by the engine's rules for its weight and the codes of its input."""

    def __init__(self, site: CodedSite, fixed: Tensor | None) -> None:
        super().__init__()
        self.path = site.path
        bias = site.bias()
        self.weight = _weight(site)
        self.bias = None if bias is None else bias.float()
        self.coded = None if site.quantize is None else EngineInput(site, fixed)
        self.rounds_weight = _rounds_weight(site)

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.coded is None else self.coded(x)
        return nn.functional.linear(given, self.weight, self.bias)


def follow_routes(ruled: GraphModule, engine: nn.Module) -> None:
    """Let each input of ``ruled`` know what ``engine``, run before it on the same tokens, was given
    at that site: an expert there sees the tokens that are routed to it."""
    for linear in _linears(ruled):
        if linear.coded is not None:
            engine.get_submodule(linear.path).register_forward_pre_hook(_noting(linear.coded))


def _noting(coded: EngineInput) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        coded.reached = inputs[0].detach()

    return note


def _linears(ruled: GraphModule) -> list[_Linear]:
    return [module for module in ruled.modules() if isinstance(module, _Linear)]


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
    linears = _linears(ruled)
    inputs = [linear.coded for linear in linears if linear.coded is not None]
    found = [said for each in inputs for said in each.differences()]
    if any(linear.rounds_weight for linear in linears):
        found.append("weights under two scales are rounded to bfloat16 there")
    last = "sums are of floats there" if inputs else "float sums in another order"
    return "; ".join([*reasons, *dict.fromkeys(found), last])
