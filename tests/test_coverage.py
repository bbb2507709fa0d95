"""Every matrix of the decoder blocks is a site or stands by name among what stays in float."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import ModelError, NoEffectError, VerificationError
from fxquant.evaluation.converter import Converter, measure
from fxquant.evaluation.tables import format_table
from fxquant.evaluation.token_windows import Windows
from fxquant.ir.coverage import block_matrices, float_share
from fxquant.ir.graph import info
from fxquant.ir.size import bits_per_weight
from fxquant.passes import NameSites
from fxquant.schemes.scheme import Scheme
from tests.architectures import build, gpt2, llama, opt, token_ids
from tests.environments import TRANSFORMERS_5
from tests.test_sweep_tables import PROTOCOL

LAYER = "model.layers.1.mlp"


class Experts(nn.Module):
    """Two experts in one parameter, both run for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        flat = x.reshape(1, batch * length, width).expand(2, -1, -1)
        return torch.bmm(flat, self.w).sum(0).view(batch, length, width)


class RawLinear(nn.Module):
    """A matrix and a gain: no linear layer, though it calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)
        self.gain = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) * self.gain


class Scaled(nn.Module):
    """A matrix that is no one's operand before it is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, 32) / 6)
        self.scale = nn.Parameter(torch.rand(32, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.matrix * self.scale).t()


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return y


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(32, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.both(x, x)
        return y


LEFT: dict[str, tuple[Callable[[], nn.Module], dict[str, str], int]] = {
    "experts": (Experts, {f"{LAYER}.w": "a parameter 2x32x32 that goes into bmm"}, 2048),
    "raw linear": (RawLinear, {LAYER: "a linear inside a module of the model's own class"}, 1024),
    "scaled": (
        Scaled,
        {
            f"{LAYER}.matrix": "a parameter 32x32 that goes into mul",
            f"{LAYER}.scale": "a parameter 32x1 that goes into mul",
        },
        1056,
    ),
    "convolution": (Convolved, {f"{LAYER}.conv": "a convolution, not a linear layer"}, 1024),
    "bilinear": (Bilinear, {f"{LAYER}.both": "a Bilinear, not a linear layer"}, 32**3),
}


def with_mlp(mlp: nn.Module) -> PreTrainedModel:
    model = llama()
    model.set_submodule(LAYER, mlp)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("what", LEFT)
def test_what_is_no_linear_layer_is_listed_and_counted(what: str) -> None:
    torch.manual_seed(0)
    make, expected, weights = LEFT[what]
    model = with_mlp(make())
    graph = fxquant.convert(model, "w8")
    found = {entry.path: entry.reason for entry in info(graph).left_in_float}
    for path, reason in expected.items():
        assert found[path].startswith(reason)
    linears = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    total = linears + weights
    assert float_share(graph) == pytest.approx(weights / total)
    scales = sum(s.shape[0] for s in info(graph).sites if s.role == "linear")
    bits = (8 * linears + 32 * scales + 32 * weights) / total
    assert bits_per_weight(graph) == pytest.approx(bits)
    said = f"left in float    {weights / total:.1%} of the blocks' weights stay in float"
    assert said in str(fxquant.inspect(graph))
    assert fxquant.inspect(graph).to_dict()["float_share"] == pytest.approx(weights / total)


def test_falcons_linears_are_sites() -> None:
    config = hf.FalconConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = build(hf.FalconForCausalLM, config)
    graph = fxquant.convert(model, "w8a8-dynamic-token")
    assert len([site for site in info(graph).sites if site.role == "linear"]) == 8
    assert float_share(graph) == 0
    ids = token_ids(2, 13)
    with torch.no_grad():
        assert not torch.equal(graph(ids), model(ids).logits)


def test_a_whole_conversion_says_nothing_of_a_share() -> None:
    graph = fxquant.convert(opt(), "w8")
    assert float_share(graph) == 0
    assert "left in float  " not in str(fxquant.inspect(graph))
    assert math.isnan(float_share(fxquant.convert(opt(), "fp")))
    assert fxquant.inspect(fxquant.trace(opt())).to_dict()["float_share"] is None


def test_what_an_override_leaves_counts() -> None:
    scheme = {"scheme": "w8", "overrides": {"*.fc1": "fp"}}
    graph = fxquant.convert(opt(), scheme)
    assert float_share(graph) == pytest.approx(2048 / (2 * 2048 + 4 * 1024))


def test_a_block_that_is_called_twice_is_a_share() -> None:
    model = llama()
    layers: Any = model.get_submodule("model.layers")
    layers[1].mlp = layers[0].mlp
    graph = fxquant.convert(model, "w8")
    reasons = {entry.path: entry.reason for entry in info(graph).left_in_float}
    assert "called 2 times" in reasons["model.layers.0.mlp.up_proj"]
    assert 0 < float_share(graph) < 1


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token+attn8", "w8a8-static:absmax+attn8"])
def test_products_of_an_attention_that_is_called_twice_stay_in_float(scheme: str) -> None:
    """Its two calls would share the scales, and the observers, of one site."""
    model = llama(num_hidden_layers=3)
    layers: Any = model.get_submodule("model.layers")
    layers[2].self_attn = layers[1].self_attn
    ids = token_ids(2, 9)
    graph = fxquant.convert(model, scheme, calibration=[ids])
    products = [site.path for site in info(graph).sites if site.role == "matmul"]
    assert products == [f"model.layers.0.self_attn.{kind}" for kind in ("qk", "pv")]
    texts = [note.text for note in info(graph).notes if note.site == "model.layers.1.self_attn.qk"]
    assert len(texts) == 2
    assert all("2 attentions of one module" in text for text in texts)
    expected = model(ids, use_cache=False).logits  # a cache takes the two for one layer
    assert float((graph(ids) - expected).norm() / expected.norm()) < 0.1


def test_a_block_that_stands_twice_is_one() -> None:
    model = llama()
    layers: Any = model.get_submodule("model.layers")
    model.get_submodule("model").layers = nn.ModuleList([layers[0], layers[1], layers[0]])
    model.config.num_hidden_layers = 3
    graph = fxquant.trace(model)
    assert info(graph).blocks == ("model.layers.0", "model.layers.1")
    with pytest.raises(ModelError, match=r"layers\.0\.\S+ is used more than once"):
        fxquant.convert(graph, "w8+rotate")


@pytest.mark.skipif(TRANSFORMERS_5, reason="has no HFTracer")
def test_a_linear_by_a_computed_matrix_is_listed() -> None:
    """HFTracer, which sees no operations on weights themselves, makes a constant of the matrix."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            own: Any = self._parameters["weight"]
            return functional.linear(x, own * 2)

    model = llama()
    down: Any = model.get_submodule(f"{LAYER}.down_proj")
    down.__class__ = Doubled
    graph = fxquant.convert(model, "w8")
    assert f"{LAYER}.down_proj" in {entry.path for entry in info(graph).left_in_float}
    with pytest.raises(ModelError, match=r"^rotate: "):
        fxquant.convert(model, "w8+rotate")


@torch.no_grad()
@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_what_makes_a_weight_is_no_block(path: str) -> None:
    """torch keeps parametrizations in a ModuleList."""
    model = llama()
    parametrize.register_parametrization(model.get_submodule(path), "weight", nn.Tanh())
    graph = fxquant.trace(model)
    assert info(graph).blocks == ("model.layers.0", "model.layers.1")
    expected = model(token_ids(2, 9)).logits
    rotated = fxquant.convert(graph, "fp+rotate")(token_ids(2, 9))
    assert float((rotated - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("scheme", ["w8", "w8a8-dynamic-token", "w8a8-static", "fp32-gemm"])
def test_a_scheme_that_quantizes_nothing_is_an_error(scheme: str) -> None:
    """As Falcon's was, whose linears were of a class of its own: Δloss 0 without a word."""
    model = llama(num_hidden_layers=1)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            other = RawLinear()
            other.weight = nn.Parameter(module.weight.detach())
            other.gain = nn.Parameter(torch.rand(module.out_features) + 0.5)
            model.set_submodule(name, other)
    calibration = [token_ids(2, 9)] if scheme == "w8a8-static" else None
    message = rf"^scheme \S+ quantizes nothing .*{'q_proj: a linear inside'}"
    with pytest.raises(NoEffectError, match=message):
        fxquant.convert(model, scheme, calibration=calibration)
    assert len(info(fxquant.convert(model, "fp")).left_in_float) >= 7


def test_overrides_alone_may_name_the_head() -> None:
    graph = fxquant.convert(opt(), {"scheme": "fp", "overrides": {"head": "w8"}})
    assert graph.get_buffer("lm_head.weight").dtype == torch.int8


@pytest.mark.parametrize("build_", [opt, gpt2, llama])
def test_every_matrix_of_the_blocks_is_found(build_: Callable[[], PreTrainedModel]) -> None:
    model = build_()
    named: GraphModule = NameSites()(fxquant.trace(model))
    blocks = info(named).blocks
    expected = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.startswith(tuple(f"{block}." for block in blocks))
    )
    assert sum(matrix.weights for matrix in block_matrices(named)) == expected


def test_a_matrix_that_nothing_names_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxquant.passes import name_sites

    monkeypatch.setattr(name_sites, "_of_functions", lambda gm: [])
    with pytest.raises(VerificationError, match=rf"{LAYER}\.w is a matrix of the blocks, but no"):
        fxquant.convert(with_mlp(Experts()), "w8")


def test_rows_of_an_evaluation_say_the_share() -> None:
    graph = fxquant.trace(with_mlp(Experts()))
    windows = Windows(
        token_ids(2, 12), token_ids(0, 12), torch.tensor([11, 11], dtype=torch.int64), PROTOCOL
    )
    row = measure(Converter(graph, None), Scheme.parse("w8"), windows, 1, None)
    assert row.float_share == pytest.approx(2048 / (2048 + 9216), abs=0.1)
    assert f"w8 [{row.float_share:.1%} of the blocks' weights stay in float]" in format_table([row])
    plain = measure(Converter(graph, None), Scheme.parse("fp"), windows, 1, None)
    assert plain.float_share is None
    assert type(row).from_json(json.loads(json.dumps(row.to_json()))) == row


def test_the_graph_keeps_its_coverage_when_it_is_saved(tmp_path: Any) -> None:
    graph = fxquant.convert(with_mlp(Experts()), "w8")
    fxquant.save(graph, tmp_path / "saved")
    again = fxquant.load(tmp_path / "saved")
    assert float_share(again) == float_share(graph)
    assert bits_per_weight(again) == bits_per_weight(graph)
