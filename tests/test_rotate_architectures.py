"""rotate on every architecture: the same function, the plain swap's codes, and the reasons."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import ModelError
from fxquant.ir.graph import info, linear_parameters, linear_sites, source_of
from fxquant.ir.leaves import OnlineRotation
from fxquant.structure.residual import residual_stream
from tests import reference
from tests.architectures import ARCHITECTURES, gpt2, llama, opt, padding_mask, token_ids
from tests.environments import TRANSFORMERS_5
from tests.more_architectures import MIXTURES, MORE
from tests.reference import PLAIN, PlainLinear
from tests.test_more_architectures import slow_but
from tests.test_reference import FLIPPED, check_codes_and_logits

EVERY = {**ARCHITECTURES, **MORE}
# Each of another structure: scaled and normalized embeddings, gains of 1 + w, norms behind the
# sublayers, written out with and without a mean, and as functions; routers, masked inputs.
SHORT = (
    *("gpt2", "llama", "gemma", "gemma2-eager", "bloom", "olmo2", "cohere", "olmo", "nemotron"),
    *("xglm", "lfm2", "gpt-oss", "gpt-neox-parallel"),
)
REASONS = {"opt-post-layernorm": "does not read the stream that the token embedding starts"}
TURNED = ("gemma2-sdpa", "gemma2-eager", "gemma3", "olmo2")  # 2 values of each of 2 layers
# The linears that end MLPs, experts and convolutions.
ENDS = ("down_proj", "fc2", "mlp.c_proj", "4h_to_h", "w2", "fc_out", "conv.out_proj")
# Their masks, or their grouped kernels, are not made for float64.
IN_FLOAT32 = {"opt-eager", "llama-eager", "gemma2-eager", "bloom", "xglm", "mpt"}
IN_FLOAT32 |= set(MIXTURES) if TRANSFORMERS_5 else set()
# Rotated or not, the logits differ by the rounding of some tens of operations in a row, each of
# which sums some tens of products.
ROUNDINGS = 64


def logits(graph: GraphModule) -> Tensor:
    mask = padding_mask(3, 11, "left")
    with torch.no_grad():
        found = graph(input_ids=token_ids(3, 11), attention_mask=mask)
    assert isinstance(found, Tensor)
    return found[mask.bool()]


def check_same(before: GraphModule, after: GraphModule, dtype: torch.dtype) -> None:
    expected = logits(before)
    allowed = ROUNDINGS * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((logits(after) - expected).abs().max()) <= allowed


def is_rotated(graph: GraphModule, node: Node) -> bool:
    found = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(found, OnlineRotation)


def computes_in_float32(graph: GraphModule) -> bool:
    """Whether a norm casts the stream, as Llama's does in any dtype."""
    casts = [node for node in graph.graph.nodes if node.op == "call_method"]
    return any(node.target == "float" or torch.float32 in node.args for node in casts)


@pytest.mark.parametrize("name", [p for p in slow_but(SHORT, EVERY) if p.id not in REASONS])  # type: ignore[attr-defined]
def test_the_float_function_stays(name: str) -> None:
    """With padding; every linear of the blocks has changed, and each MLP's end is rotated."""
    model = EVERY[name]()
    dtype = torch.float32 if name in IN_FLOAT32 else torch.float64
    before = fxquant.convert(model.to(dtype), "fp")
    after = fxquant.convert(before, "fp+rotate(seed=3)")
    rounds = dtype if not computes_in_float32(before) else torch.float32
    check_same(before, after, rounds)
    assert len(residual_stream(after).turned) == (4 if name in TURNED else 0)
    kept = set()
    for site, node in linear_sites(after):
        old, new = (g.get_submodule(site.path).weight for g in (before, after))
        if old.shape == new.shape and torch.allclose(old, new, atol=1e-3):  # type: ignore[arg-type]
            kept.add(site.path)
        assert site.path.endswith(ENDS) == is_rotated(after, source_of(node)), site.path
    # What a norm behind it reads stays as it was; an MLP's end has other columns.
    attention = {s.path for s in info(after).sites if s.path.endswith("o_proj")}
    assert kept == (attention if name in TURNED else set())


@pytest.mark.parametrize("name", REASONS)
def test_where_it_cannot_be_the_reason_is_given(name: str) -> None:
    with pytest.raises(ModelError, match=REASONS[name]):
        fxquant.convert(EVERY[name](), "fp+rotate")


def swapped(graph: GraphModule, plain: reference.Plain) -> GraphModule:
    """A copy of a float graph whose linear sites are PlainLinears."""
    found = copy.deepcopy(graph)
    for site, _ in linear_sites(graph):
        if site.role == "linear":
            weight, bias = linear_parameters(graph.get_submodule(site.path))
            found.set_submodule(site.path, PlainLinear(weight, bias, plain))
    return found


def take_ties(plain: GraphModule, qmodel: GraphModule) -> None:
    """Let ``plain`` have the codes of ``qmodel`` where a weight of 8 bits lies next to a tie."""
    ties = weights = 0
    for site, _ in linear_sites(qmodel):
        found, wanted = qmodel.get_submodule(site.path), plain.get_submodule(site.path)
        if isinstance(wanted, PlainLinear):
            scale = found.get_buffer("weight_scale").double().reshape(-1, 1)
            steps = (found.get_buffer("weight").double() - wanted.weight / scale).round()
            assert float(steps.abs().max()) <= 1
            wanted.weight += steps * scale
            ties, weights = ties + int(steps.count_nonzero()), weights + steps.numel()
    assert ties <= FLIPPED * weights


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token", "w4-g12-asym/a8-dynamic-token-asym"])
@pytest.mark.parametrize("name", [p for p in slow_but((), EVERY) if p.id not in REASONS])  # type: ignore[attr-defined]
def test_agrees_with_the_module_swap(name: str, scheme: str) -> None:
    graph = fxquant.trace(EVERY[name]())
    rotated = fxquant.convert(graph, "fp+rotate")
    plain = swapped(rotated, PLAIN[scheme])
    inputs = {"input_ids": token_ids(3, 17, seed=3)}
    qmodel = fxquant.convert(graph, f"{scheme}+rotate")
    if scheme.startswith("w8"):
        take_ties(plain, qmodel)
    wanted = plain(**inputs)
    check_codes_and_logits(qmodel, wanted, graph(**inputs), reference.codes(plain), inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2-eager", "nemotron"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    graph = fxquant.convert(EVERY[name](), "w8a8-dynamic-token+rotate")
    fxquant.save(graph, tmp_path / "saved")
    for stream in (False, True):
        loaded = fxquant.load(tmp_path / "saved", stream=stream)
        assert torch.equal(logits(loaded), logits(graph))


# Neighbours of the structures above


def _changed(model: PreTrainedModel, path: str, module: Callable[[Any], nn.Module]) -> GraphModule:
    """The float graph of ``model`` with the modules that end in ``path`` replaced."""
    for name, found in list(model.named_modules()):
        if name.endswith(path):
            model.set_submodule(name, module(found).eval())
    return fxquant.trace(model, frontend="recorder")


class Factor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def _norm(kind: type[nn.Module]) -> nn.Module:
    norm = kind(32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn(32, generator=generator))
    return norm


def _rotated(graph: GraphModule) -> GraphModule:
    after = fxquant.convert(graph, "fp+rotate")
    check_same(graph, after, torch.float32)
    return after


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize(("build", "path"), [(gpt2, "mlp.c_proj"), (llama, "mlp.down_proj")])
def test_any_norm_behind_a_sublayer(
    build: Callable[[], PreTrainedModel], path: str, kind: type[nn.Module]
) -> None:
    """Also where the stream's norms subtract the mean and that one does not, and the reverse."""
    graph = _changed(build(), path, lambda linear: nn.Sequential(linear, _norm(kind)))
    assert len(residual_stream(_rotated(graph)).turned) == 2
    with pytest.raises(ModelError, match="can be rotated by a node only; leave online=false out"):
        fxquant.convert(graph, "fp+rotate(online=false)")


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_norms_that_are_modules(kind: type[nn.Module]) -> None:
    _rotated(_changed(llama(), "norm", lambda _: _norm(kind)))


def test_norms_of_two_kinds_are_refused() -> None:
    graph = _changed(llama(), "input_layernorm", lambda _: _norm(nn.LayerNorm))
    with pytest.raises(ModelError, match=r"some readers .* subtract its mean and some do not"):
        fxquant.convert(graph, "fp+rotate")


def test_a_factor_behind_a_norm() -> None:
    """It commutes with the rotation, but a bias that its readers take over would miss it."""
    _rotated(_changed(llama(), "input_layernorm", lambda norm: nn.Sequential(norm, Factor())))
    graph = _changed(gpt2(), "ln_1", lambda norm: nn.Sequential(norm, Factor()))
    with pytest.raises(ModelError, match="scales what a norm with a bias gives"):
        fxquant.convert(graph, "fp+rotate")


def test_a_norm_that_reads_something_else_too() -> None:
    """The last linear of the MLP, 32 wide, is normalized by the block's own norm."""
    model = opt()
    for layer in model.get_submodule("model.decoder.layers"):
        layer.fc2 = nn.Sequential(layer.fc2, layer.final_layer_norm)
    graph = fxquant.trace(model.eval(), frontend="recorder")
    with pytest.raises(ModelError, match=r"fc2\.1 also normalizes what is not the stream"):
        fxquant.convert(graph, "fp+rotate")


class OwnMean(nn.Module):
    """A LayerNorm without gain, written out: the mean of what it is given, or of twice that."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.factor == 1 else self.factor * x
        deviation = x - other.mean(-1, keepdim=True)
        return deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + 1e-5)


def test_a_mean_of_another_value_is_no_layer_norm() -> None:
    _rotated(_changed(llama(), "norm", lambda _: OwnMean(1.0)))
    with pytest.raises(ModelError, match="does not commute with a rotation"):
        fxquant.convert(_changed(llama(), "norm", lambda _: OwnMean(2.0)), "fp+rotate")


def test_norms_in_the_stream_are_named() -> None:
    graph = fxquant.trace(opt(do_layer_norm_before=False))
    with pytest.raises(ModelError, match="the norms stand in the stream itself"):
        fxquant.convert(graph, "fp+rotate")
